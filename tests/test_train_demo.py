"""tools/train_demo.py: its scan, a toy run to the end, and what it says to bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import train_demo
from click.testing import Result
from torch import Tensor
from training_loop import Settings, new_model
from training_scan import linear_recurrence, selective_scan
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaForCausalLM
from typer.testing import CliRunner

NOUNS = ("river", "stone", "lamp", "garden", "letter", "winter", "bridge", "engine", "harbour")
VERBS = ("finds", "carries", "follows", "leaves", "remembers", "paints")
TOY = [
    "--d-model=32", "--layers=2", "--state=4", "--vocabulary=300", "--length=48", "--batch=8",
    "--steps=20", "--lr=0.01", "--device=cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A toy's operations are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some kilobytes of sentences with a grammar, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)

    def pick(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (), generator=generator))]

    path = tmp_path_factory.mktemp("text") / "grammar.txt"
    path.write_text(
        " ".join(f"The {pick(NOUNS)} {pick(VERBS)} the {pick(NOUNS)}." for _ in range(300))
    )
    return path


def train(*arguments: str | Path) -> Result:
    return CliRunner().invoke(train_demo.app, [str(argument) for argument in arguments])


def relative_error(got: Tensor, expected: Tensor) -> float:
    difference = (got - expected).detach().norm()
    return float(difference / expected.detach().norm().clamp_min(1e-30))


def sequential_scan(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """The definition: one step after the other."""
    state = u.new_zeros(u.shape[0], *a.shape)
    outputs = []
    for t in range(u.shape[1]):
        state = torch.exp(dt[:, t, :, None] * a) * state
        state = state + (dt[:, t] * u[:, t])[..., None] * b[:, t, None, :]
        outputs.append((state * c[:, t, None, :]).sum(-1) + d * u[:, t])
    return torch.stack(outputs, dim=1)


def scan_inputs(length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    batch, channels, n = 2, 5, 3
    inputs = (
        torch.randn(batch, length, channels, dtype=dtype),
        torch.rand(batch, length, channels, dtype=dtype) * 2,
        -torch.rand(channels, n, dtype=dtype) * 20,  # some decays underflow over a chunk
        torch.randn(batch, length, n, dtype=dtype),
        torch.randn(batch, length, n, dtype=dtype),
        torch.randn(channels, dtype=dtype),
    )
    return tuple(x.requires_grad_() for x in inputs)


@pytest.mark.parametrize("length", [1, 2, 63, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_the_scan_and_its_gradient_are_the_sequential_ones(
    length: int, dtype: torch.dtype, tolerance: float
) -> None:
    inputs = scan_inputs(length, dtype)
    got, expected = selective_scan(*inputs), sequential_scan(*inputs)
    weight = torch.randn_like(expected)
    got_grads = torch.autograd.grad((got * weight).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)
    assert relative_error(got, expected) < tolerance
    for got_grad, expected_grad in zip(got_grads, expected_grads, strict=True):
        assert got_grad.isfinite().all()
        assert relative_error(got_grad, expected_grad) < tolerance


def test_the_recurrence_passes_gradcheck() -> None:
    decay = torch.rand(2, 7, 3, dtype=torch.float64, requires_grad=True)
    drive = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear_recurrence, (decay, drive))


def test_the_model_computes_what_hugging_face_computes() -> None:
    settings = Settings(d_model=32, layers=2, state=4, length=37, batch=1, steps=1, lr=0.1, seed=0)
    ours = new_model(settings, vocabulary=300).eval()
    theirs = MambaForCausalLM(ours.config).eval()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(300, (2, 37))
    with torch.no_grad():
        assert relative_error(ours(ids).logits, theirs(ids).logits) < 1e-6


def test_a_toy_learns_and_its_folder_loads(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "toy"
    result = train(text, "-o", out, "--validation", text, *TOY)
    assert result.exit_code == 0, result.output
    record = json.loads((out / "training.json").read_text())
    first, last = record["log"][0], record["log"][-1]
    assert first[0] == 1
    assert last[0] == record["steps"] == 20
    assert last[1] < 0.5 * first[1]
    assert record["tokens"] == 20 * 8 * 48

    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert tokenizer.bos_token_id == model.config.bos_token_id == 0
    sentence = "The lamp finds the river."
    ids = tokenizer(sentence, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == sentence
    with torch.no_grad():
        loss = model.float()(ids, labels=ids).loss
    assert loss < 0.5 * math.log(record["vocabulary"])
    card = (out / "README.md").read_text()
    assert "grammar.txt" in card
    assert f"{record['val_ppl']:.2f}" in card


def test_the_same_seed_gives_the_same_weights(text: Path, tmp_path: Path) -> None:
    few = [*TOY, "--steps=2"]
    for name in ("one", "two"):
        assert train(text, "-o", tmp_path / name, *few).exit_code == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def make_input(folder: Path, name: str, content: bytes | None) -> Path:
    path = folder / name
    if content is not None:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "cannot read"),
        ("empty.txt", b"", "has no text"),
        ("blank.jsonl", b'{"text": "  "}\n\n', "has no text"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "broken.jsonl:2: broken JSON"),
        ("other.jsonl", b'{"body": "a"}\n', "other.jsonl:1: expected an object"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("table.csv", b"a,b", "expected a .txt or a .jsonl"),
        ("short.txt", b"Too short.", "fewer than one sequence of 48"),
    ],
)
def test_bad_text_is_one_clear_line_and_leaves_nothing(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = make_input(tmp_path, name, content)
    before = sorted(tmp_path.iterdir())
    result = train(path, "-o", tmp_path / "out", *TOY)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_with_something_in_it_is_left_alone(text: Path, tmp_path: Path) -> None:
    (tmp_path / "keep").write_text("mine")
    result = train(text, "-o", tmp_path, *TOY)
    assert result.exit_code == 2
    assert "is there already" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["keep"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [(["--device=tpu"], 2, "unknown device"), (["--lr=1e30"], 1, "the loss is")],
)
def test_other_failures_leave_nothing(
    text: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    result = train(text, "-o", tmp_path / "out", *TOY, *arguments)
    assert (result.exit_code, list(tmp_path.iterdir())) == (code, [])
    assert message in result.stderr


def test_an_interrupt_leaves_nothing(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training_loop._update", interrupt)
    result = train(text, "-o", tmp_path / "out", *TOY)
    assert (result.exit_code, list(tmp_path.iterdir())) == (130, [])
