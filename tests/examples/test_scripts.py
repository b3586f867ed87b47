"""The example scripts: they run, and what they print is so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import ssmc

from .conftest import EXAMPLES

Example = Callable[[str], ModuleType]


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    environment = os.environ | {"NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_own_module_keeps_its_accuracy(
    example: Example, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_module = example("own_module")
    result = own_module.compare()
    assert result.float_accuracy > 0.9
    assert abs(result.int8_accuracy - result.float_accuracy) < 0.01
    assert 0 < result.error < 0.1
    assert result.compiled.lowered.kept == []
    assert len(result.compiled.lowered.fused) == 6
    ids, _ = own_module.sequences(3, 21, seed=5)
    again = ssmc.load(result.compiled.save(tmp_path / "out"))
    assert torch.equal(again(ids)[0], result.compiled(ids)[0])
    own_module.main()
    assert f"int8 {result.int8_accuracy:.3f}" in capsys.readouterr().out


def test_pass_table_prints_what_it_measures() -> None:
    row = "hadamard,absmax,quantise{embedding=false,head=false}"
    small = ("--samples", "2", "--windows", "2", "--length", "65")
    ran = script("pass_table.py", "--only", "--also", row, "--markdown", *small)
    assert ran.returncode == 0, ran.stderr
    _, _, baseline, measured = ran.stdout.splitlines()
    cells = [cell.strip() for cell in measured.strip("|").split("|")]
    reference, perplexity, loss, size, ratio = (
        float(baseline.split("|")[2]),
        *map(float, cells[1:]),
    )
    assert cells[0] == f"`{row}`"
    assert loss == pytest.approx(100 * (perplexity / reference - 1), abs=0.02)
    assert abs(loss) < 5
    assert ratio == pytest.approx(size / 11.2, abs=2e-3)
    assert 0.6 < ratio < 0.75


def test_pass_table_says_what_is_wrong_before_it_runs() -> None:
    ran = script("pass_table.py", "--only", "--also", "hadamard{blok=4}")
    assert ran.returncode == 2
    assert "did you mean block?" in ran.stderr
    assert ran.stdout == ""


def test_pass_table_rows_can_all_be_planned(example: Example) -> None:
    from ssmc.recipe import make_recipe

    for passes in example("pass_table").ROWS:
        plan = [p.name for p in make_recipe(passes=passes).plan()]
        assert plan[-1] == "quantise"
