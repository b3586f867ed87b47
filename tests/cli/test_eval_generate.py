"""`ssmc eval` and `ssmc generate`, of models and of artefacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import EOS, tokenizer

import ssmc
from ssmc.corpus import token_windows
from ssmc.evaluate import perplexity
from ssmc.overlap import run_hashes

from .conftest import Call


@pytest.mark.parametrize("mode", ["prefill", "recurrent"])
@pytest.mark.parametrize("which", ["model", "artefact"])
def test_eval(call: Call, tiny_folder: Path, tiny_artefact: Path, mode: str, which: str) -> None:
    target = tiny_folder if which == "model" else tiny_artefact
    text = tiny_folder / "text.txt"
    arguments = ("eval", target, "--text", text, "--window", 20, "--limit", 7, "--mode", mode)
    data = call(*arguments, "--json").json
    windows = token_windows(tokenizer(), [text.read_text()], EOS, 20)[:7]
    model = (
        ssmc.trace(ssmc.load_model(str(target)).module) if which == "model" else ssmc.load(target)
    )
    expected = perplexity(model, windows, mode).perplexity  # type: ignore[arg-type]
    assert data["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert (data["tokens"], data["windows"]) == (7 * 19, 7)
    ended = call(*arguments)
    first, second, *more = ended.out.splitlines()
    assert first == f"target       {target}"
    assert second.startswith(f"perplexity   {expected:.4f}   133 tokens in 7 windows of 20, {mode}")
    compared = which == "artefact" and len(run_hashes(windows)) > 0
    assert [line.split()[0] for line in more] == (["overlap"] if compared else [])
    assert "scoring" in ended.err


def test_eval_by_length(call: Call, tiny_artefact: Path, tiny_folder: Path) -> None:
    arguments = ("eval", tiny_artefact, "--text", tiny_folder / "text.txt", "--window", 150)
    data = call(*arguments, "--json").json
    ranges = [(part["first"], part["last"]) for part in data["by_length"]]
    assert ranges == [(1, 64), (65, 128), (129, 149)]
    lines = call(*arguments, "--by-length").out.splitlines()[2:5]
    assert [line.split()[0] for line in lines] == ["1-64", "65-128", "129-149"]
    assert [float(line.split()[1]) for line in lines] == pytest.approx(
        [part["perplexity"] for part in data["by_length"]], rel=1e-4
    )


def test_eval_notices_what_was_calibrated_on(
    call: Call, tiny_artefact: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    own = ("eval", tiny_artefact, "--text", tiny_folder / "text.txt", "--window", 200)
    ended = call(*own)
    assert call(*own, "--json").json["calibration_overlap"] > 0.1
    assert "this text was calibrated on" in ended.err
    other = tmp_path / "other.txt"
    drawn = torch.randint(1, 60, (2000,), generator=torch.Generator().manual_seed(5)).tolist()
    other.write_text(" ".join(f"w{i}" for i in drawn))
    ended = call("eval", tiny_artefact, "--text", other, "--window", 200)
    assert "overlap      0.0%" in ended.out
    assert "calibrated on" not in ended.err


def test_eval_of_the_simulation(call: Call, tiny_folder: Path, tiny_artefact: Path) -> None:
    arguments = (
        "eval",
        tiny_artefact,
        "--text",
        tiny_folder / "text.txt",
        "--window",
        20,
        "--json",
    )
    simulated = call(*arguments, "--execution", "simulated").json["perplexity"]
    assert simulated == call(*arguments).json["perplexity"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "recurent"], "did you mean recurrent?"),
        (["--execution", "lowred"], "did you mean lowered?"),
        (["--text", "nowhere.jsonl"], "No such file"),
        (["--window", "1"], "'--window'"),
        (["--limit", "0"], "'--limit'"),
        (["--window", "100000"], "fewer than one window of 100000"),
    ],
)
def test_eval_refuses(call: Call, tiny_artefact: Path, arguments: list[str], message: str) -> None:
    ended = call("eval", tiny_artefact, *arguments)
    assert ended.code == 2
    assert message in ended.error
    assert ended.out == ""


@pytest.mark.parametrize("which", ["model", "artefact"])
def test_generate(call: Call, tiny_folder: Path, tiny_artefact: Path, which: str) -> None:
    target = tiny_folder if which == "model" else tiny_artefact
    arguments = ("generate", target, "--prompt", "w3 w5 w7", "-n", 6)
    data = call(*arguments, "--json").json
    assert len(data["tokens"]) <= 6
    made = [t for t in data["tokens"] if t != EOS]
    assert "w3 w5 w7" + data["text"] == tokenizer().decode([3, 5, 7, *made])
    ended = call(*arguments)
    assert ended.out == f"w3 w5 w7{data['text']}\n"
    assert f"{len(data['tokens'])} tokens in" in ended.err
    ids = torch.tensor([[3, 5, 7]])
    if which == "artefact":
        assert ssmc.load(target).generate(ids, 6)[0, 3:].tolist() == data["tokens"]


def test_generate_draws_by_the_seed(call: Call, tiny_artefact: Path) -> None:
    def draw(*more: Any) -> list[int]:
        arguments = ("--prompt", "w3", "--temperature", 2, *more, "--json")
        return list(call("generate", tiny_artefact, *arguments).json["tokens"])

    assert draw("--seed", 1) == draw("--seed", 1) != draw("--seed", 2)
    assert (
        draw("--top-k", 1)
        == call("generate", tiny_artefact, "--prompt", "w3", "--json").json["tokens"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "\udcff"], "the prompt is not UTF-8 text"),
        ([], "there is nothing to go on from"),
        (["--prompt", "w1", "--temperature", "-1"], "temperature -1.0"),
        (["--prompt", "w1", "--top-k", "0"], "top_k 0 keeps no token"),
        (["--prompt", "w1", "--top-p", "0"], "top_p 0.0"),
        (["--prompt", "w1", "--stop", ""], "a stop string is empty"),
        (["--prompt", "w1", "-n", "0"], "'-n'"),
    ],
)
def test_generate_refuses(
    call: Call, tiny_artefact: Path, arguments: list[str], message: str
) -> None:
    ended = call("generate", tiny_artefact, *arguments)
    assert ended.code == 2
    assert message in ended.error
    assert ended.out == ""


def test_a_target_without_tokenizer(call: Call, tiny_folder: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    for command in (["generate", folder, "--prompt", "a"], ["eval", folder]):
        ended = call(*command)
        assert ended.code == 2
        assert "has no tokenizer" in ended.error


COMMANDS = [["eval"], ["generate", "--prompt", "w3"]]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("which", ["model", "artefact"])
def test_a_device_that_is_missing(
    call: Call, tiny_folder: Path, tiny_artefact: Path, command: list[str], which: str
) -> None:
    target = tiny_folder if which == "model" else tiny_artefact
    name, *rest = command
    ended = call(name, target, *rest, "--device", "cuda:97")
    assert ended.code == 4
    assert "there is no device cuda:97" in ended.error
    assert call(name, target, *rest, "--device", "gpu").code == 2


def test_backends_say_the_same(call: Call, tiny_folder: Path, tiny_artefact: Path) -> None:
    score = ("eval", tiny_artefact, "--text", tiny_folder / "text.txt", "--window", 20, "--json")
    write = ("generate", tiny_artefact, "--prompt", "w3 w5", "--json")
    for arguments, field in ((score, "perplexity"), (write, "tokens")):
        on_cpu = (*arguments, "--device", "cpu", "--backend")
        assert call(*on_cpu, "reference").json[field] == call(*on_cpu, "cpu").json[field]
        ended = call(*on_cpu, "cpuu")
        assert ended.code == 2
        assert "did you mean cpu?" in ended.error


def test_every_backend_is_named_in_the_help() -> None:
    from typer.main import get_command

    from ssmc.cli.main import app
    from ssmc.lowering import BACKENDS

    commands = get_command(app).commands.values()  # type: ignore[attr-defined]
    options = [o for c in commands for o in c.params if o.name == "backend"]
    assert len(options) >= 4
    for option in options:
        assert all(name in option.help for name in ("auto", *BACKENDS))
