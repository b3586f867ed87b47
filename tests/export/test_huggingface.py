"""A folder of the format `hf`, as transformers loads and runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from docs.blocks import ROOT, naming
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import ssmc
from ssmc.errors import ArtefactError, UsageError
from ssmc.export import export
from ssmc.integrations.quantizer import SsmcConfig, SsmcQuantizer
from ssmc.runtime import CompiledModel

PROMPTS = ["The old man and", "In the beginning God created the heavens and the earth, and"]


@pytest.fixture(scope="module")
def folder(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(demo_folder, tmp_path_factory.mktemp("hf") / "demo").out


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def compiled(demo_folder: Path) -> CompiledModel:
    return ssmc.load(demo_folder, device="cpu")


def greedy(compiled: CompiledModel, ids: Tensor, count: int) -> Tensor:
    return compiled.generate(ids, count)[:, ids.shape[1] :]


def test_logits_are_equal_at_once_and_in_parts(
    model: Any, tokenizer: Any, compiled: CompiledModel
) -> None:
    ids = tokenizer(PROMPTS[1], return_tensors="pt").input_ids
    expected, _ = compiled(ids)
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids, logits_to_keep=2).logits, expected[:, -2:])
    first = model(ids[:, :5])
    second = model(ids[:, 5:], past_key_values=first.past_key_values)
    assert torch.equal(torch.cat([first.logits, second.logits], 1), expected)
    assert model(ids, use_cache=False).past_key_values is None
    assert model(ids, return_dict=False)[0].shape == expected.shape


def test_the_loss_is_that_of_the_logits(
    model: Any, tokenizer: Any, compiled: CompiledModel
) -> None:
    ids = tokenizer(PROMPTS[1], return_tensors="pt").input_ids
    logits, _ = compiled(ids)
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert torch.allclose(model(ids, labels=ids).loss, expected, atol=0, rtol=1e-6)


def test_generate_gives_the_tokens_of_ssmc(
    model: Any, tokenizer: Any, compiled: CompiledModel
) -> None:
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    found = model.generate(ids, max_new_tokens=12, do_sample=False)[:, ids.shape[1] :]
    assert torch.equal(found, greedy(compiled, ids, 12))


def test_stop_strings_end_a_text(model: Any, tokenizer: Any, compiled: CompiledModel) -> None:
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    tokens = greedy(compiled, ids, 12)
    stop = tokenizer.decode(tokens[0, 4])
    given = {"max_new_tokens": 12, "do_sample": False, "stop_strings": stop, "tokenizer": tokenizer}
    found = model.generate(ids, **given)[:, ids.shape[1] :]
    assert 0 < found.shape[1] <= 5
    assert torch.equal(found, tokens[:, : found.shape[1]])
    assert stop in tokenizer.decode(found[0])
    assert stop not in tokenizer.decode(found[0, :-1])


def test_padding_on_the_left_changes_nothing(
    model: Any, tokenizer: Any, compiled: CompiledModel
) -> None:
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert batch.attention_mask[0, 0] == 0
    logits = model(**batch).logits
    found = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, -6:]
    for row, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        alone, _ = compiled(ids)
        assert torch.equal(logits[row : row + 1, -ids.shape[1] :], alone)
        assert torch.equal(found[row : row + 1], greedy(compiled, ids, 6))


def test_beams_score_as_the_model_scores_their_text(
    model: Any, tokenizer: Any, compiled: CompiledModel
) -> None:
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    found = model.generate(
        ids, max_new_tokens=6, num_beams=3, length_penalty=0.0, early_stopping=True,
        return_dict_in_generate=True, output_scores=True, do_sample=False,
    )  # fmt: skip
    text = found.sequences
    logits, _ = compiled(text)
    scores = logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
    chosen = scores.gather(1, text[0, ids.shape[1] :, None]).sum()
    assert torch.allclose(found.sequences_scores[0], chosen, atol=1e-4)
    plain = greedy(compiled, ids, 6)
    logits, _ = compiled(torch.cat([ids, plain], 1))
    scores = logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
    assert chosen >= scores.gather(1, plain[0, :, None]).sum()


def test_a_pipeline_runs_it(
    folder: Path, tokenizer: Any, compiled: CompiledModel, caplog: pytest.LogCaptureFixture
) -> None:
    made = pipeline("text-generation", model=str(folder))
    text = made(PROMPTS[0], max_new_tokens=6, do_sample=False)[0]["generated_text"]
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    assert text == PROMPTS[0] + tokenizer.decode(greedy(compiled, ids, 6)[0])
    assert "not supported" not in caplog.text


def test_the_example_of_the_docs_runs(
    folder: Path,
    tokenizer: Any,
    compiled: CompiledModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    example = naming(ROOT / "docs" / "export.md", "demo-hf")
    (tmp_path / "demo-hf").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    exec(compile(example.text, example.path, "exec"), {})
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    expected = tokenizer.decode(torch.cat([ids, greedy(compiled, ids, 12)], 1)[0])
    assert capsys.readouterr().out == f"{expected}\n"


def test_a_hybrid_has_equal_logits_and_tokens(
    shared_model: Callable[[str], Path], tmp_path: Path
) -> None:
    source = shared_model("jamba-11m")
    compiled = ssmc.compile(str(source), samples=2, length=64)
    compiled.save(tmp_path / "jamba")
    model = AutoModelForCausalLM.from_pretrained(export(tmp_path / "jamba", tmp_path / "hf").out)
    ids = torch.randint(8000, (2, 12))
    assert torch.equal(model(ids).logits, compiled(ids)[0])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
    assert torch.equal(found, compiled.generate(ids, 4))


def test_the_folder_is_still_an_artefact(folder: Path, compiled: CompiledModel) -> None:
    ids = torch.randint(8000, (1, 9))
    assert torch.equal(ssmc.load(folder, device="cpu")(ids)[0], compiled(ids)[0])


def test_save_pretrained_writes_the_same_files(model: Any, folder: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "again")
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == names
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_it_is_on_one_device_and_in_one_dtype(model: Any) -> None:
    assert model.to("cpu") is model
    assert model.device == torch.device("cpu")
    assert model.get_memory_footprint() > 5_000_000
    with pytest.raises(TypeError, match=r"cannot be cast to torch\.float16"):
        model.to(torch.float16)
    quantizer = SsmcQuantizer(SsmcConfig())
    with pytest.raises(ValueError, match="on one device"):
        quantizer.update_device_map({"backbone": "cpu", "lm_head": "disk"})


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 3, 4)}, TypeError, "no argument inputs_embeds"),
        ({"output_hidden_states": True}, TypeError, "no argument output_hidden_states"),
        ({"past_key_values": object()}, TypeError, "not what this model returned"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, UsageError, "a hole"),
        ({"attention_mask": torch.tensor([[0, 0, 0]])}, UsageError, "nothing but padding"),
    ],
)
def test_what_it_cannot_serve_is_refused(
    model: Any, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model(torch.tensor([[1, 2, 3]]), **given)


def test_padding_after_the_first_call_is_refused(model: Any) -> None:
    first = model(torch.tensor([[1, 2, 3]]))
    mask = torch.tensor([[1, 1, 1, 0, 1]])
    with pytest.raises(UsageError, match="behind tokens that were run"):
        model(torch.tensor([[4, 5]]), attention_mask=mask, past_key_values=first.past_key_values)


def test_files_of_the_hub_are_found_in_its_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = "0123456789" * 4
    cached = tmp_path / "models--owner--demo"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(revision)
    shutil.copytree(folder, cached / "snapshots" / revision)
    ids = torch.tensor([[5, 6, 7]])
    found = AutoModelForCausalLM.from_pretrained(
        "owner/demo", cache_dir=tmp_path, local_files_only=True
    )
    assert torch.equal(found(ids).logits, ssmc.load(folder, device="cpu")(ids)[0])


def test_damage_is_named(folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "damaged"))
    with (copied / "graph.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ArtefactError, match=r"graph\.json has"):
        AutoModelForCausalLM.from_pretrained(copied)


def test_a_module_of_ones_own_cannot_be_expressed(tmp_path: Path) -> None:
    layer = torch.nn.Linear(8, 8)
    compiled = ssmc.compile(layer, torch.randn(2, 5, 8), calibration=torch.randn(4, 5, 8))
    compiled.save(tmp_path / "own")
    with pytest.raises(UsageError, match="'Linear' is no causal language model of transformers"):
        export(tmp_path / "own", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_an_export_is_replaced_only_with_force(demo_folder: Path, tmp_path: Path) -> None:
    out = export(demo_folder, tmp_path / "out").out
    with pytest.raises(UsageError, match="already holds"):
        export(demo_folder, out)
    export(demo_folder, out, force=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        export(demo_folder, out, force=True)
    with pytest.raises(UsageError, match="no format 'onnx'"):
        export(demo_folder, tmp_path / "other", "onnx")


def test_a_process_that_imports_transformers_alone_loads_it(folder: Path) -> None:
    assert [e.value for e in entry_points(group="torch.backends") if e.name == "ssmc"] == [
        "ssmc.integrations.autoload:register"
    ]
    script = (
        "import sys, json\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "import torch\n"
        "ids = torch.tensor([[5, 6, 7]])\n"
        "print(json.dumps(model.generate(ids, max_new_tokens=3, do_sample=False).tolist()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    ids = torch.tensor([[5, 6, 7]])
    assert json.loads(done.stdout) == ssmc.load(folder, device="cpu").generate(ids, 3).tolist()
