"""Artefacts: the same bytes for the same inputs, and what is in them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from frontend.models import tokens
from tiny import compile_tiny

import ssmc
from ssmc.runtime.artefact import GRAPH, MAIN, REPORT, TENSORS, TOKENIZER

FILES = [MAIN, GRAPH, TENSORS, REPORT, TOKENIZER]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_the_same_inputs_give_the_same_bytes(
    tiny_folder: Path, tiny_artefact: Path, tmp_path: Path
) -> None:
    text = tiny_folder / "text.txt"
    again = ssmc.compile(str(tiny_folder), calibration=text, samples=4, length=32)
    assert contents(again.save(tmp_path / "again")) == contents(tiny_artefact)
    other = ssmc.compile(str(tiny_folder), calibration=text, samples=4, length=32, seed=1)
    different = contents(other.save(tmp_path / "other"))
    assert different[TENSORS] != contents(tiny_artefact)[TENSORS]


def test_another_process_gives_the_same_bytes(
    tiny_folder: Path, tiny_artefact: Path, tmp_path: Path
) -> None:
    script = (
        "import sys, ssmc\n"
        "model, text, out = sys.argv[1:]\n"
        "ssmc.compile(model, calibration=text, samples=4, length=32).save(out)\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", script, tiny_folder, tiny_folder / "text.txt", out]
    threads = str(torch.get_num_threads())  # the order of float sums may depend on it
    environment = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": threads}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    assert contents(out) == contents(tiny_artefact)


@pytest.mark.parametrize("execution", ["lowered", "simulated"])
@pytest.mark.parametrize("architecture", ["mamba", "mamba2-groups"])
def test_reloading_gives_equal_logits(architecture: str, execution: Any, tmp_path: Path) -> None:
    compiled = compile_tiny(architecture)
    loaded = ssmc.load(compiled.save(tmp_path / "out"))
    compiled.execution = loaded.execution = execution
    ids = tokens(2, 19)
    logits, states = loaded(ids)
    expected, expected_states = compiled(ids)
    assert torch.equal(logits, expected)
    assert states.keys() == expected_states.keys()
    assert all(torch.equal(states[k], expected_states[k]) for k in states)
    assert loaded.about == json.loads((tmp_path / "out" / MAIN).read_text())
    assert loaded.report == json.loads(json.dumps(compiled.report))


def test_saving_what_was_loaded_gives_the_same_bytes(tiny_artefact: Path, tmp_path: Path) -> None:
    assert contents(ssmc.load(tiny_artefact).save(tmp_path / "copy")) == contents(tiny_artefact)


@pytest.mark.parametrize("scheme", ["w8a8", "none"])
def test_inputs_keep_their_order_and_shared_weights(
    own_module: torch.nn.Module, tmp_path: Path, scheme: str
) -> None:
    x, mask = torch.randn(2, 5, 12), torch.rand(2, 5, 12)
    passes = "absmax" if scheme == "w8a8" else ""
    compiled = ssmc.compile(
        own_module, (x, mask), calibration=[(x, mask)], passes=passes, scheme=scheme
    )
    loaded = ssmc.load(compiled.save(tmp_path / "out"))
    assert loaded.graph.inputs == ("x", "mask")
    assert torch.equal(loaded(x, mask)[0], compiled(x, mask)[0])


class Indexed(torch.nn.Module):
    """Indices of every kind; [0, 1] as a list would be two rows, as a tuple it is one place."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x[:, 1:], x[..., -1], x[0, 1], x[[0, 1]], x[:, :: x.shape[1] - 1, None], x[1]


def test_indices_are_kept(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 6)
    compiled = ssmc.compile(Indexed(), x, passes="", scheme="none")
    loaded = ssmc.load(compiled.save(tmp_path / "out"))
    expected = Indexed()(x)
    results = loaded(x)[0]
    assert len(results) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_holds_json_and_safetensors_only(tiny_artefact: Path) -> None:
    assert sorted(p.name for p in tiny_artefact.iterdir()) == sorted(FILES)
    for path in tiny_artefact.glob("*.json"):
        assert isinstance(json.loads(path.read_text()), dict)
    raw = (tiny_artefact / TENSORS).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    assert {entry["dtype"] for entry in tensors.values()} == {"I8", "F32", "BF16"}
    modes = {p.stat().st_mode & 0o777 for p in tiny_artefact.iterdir()}
    assert len(modes) == 1


def test_names_the_tools_the_source_and_the_calibration(tiny_artefact: Path) -> None:
    about = json.loads((tiny_artefact / MAIN).read_text())
    assert about["schema"] == 1
    assert about["tools"] == {"ssmc": ssmc.__version__, "torch": torch.__version__}
    assert about["source"]["kind"] == "huggingface"
    assert about["calibration"]["windows"] == 4
    assert about["files"].keys() == {*FILES} - {MAIN}
    assert str(Path.home()) not in json.dumps(about["source"])


def test_hashes_are_those_of_the_files(tiny_artefact: Path) -> None:
    about = json.loads((tiny_artefact / MAIN).read_text())
    for name, entry in about["files"].items():
        assert entry["sha256"] == hashlib.sha256((tiny_artefact / name).read_bytes()).hexdigest()
