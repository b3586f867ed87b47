"""`ssmc compile --scheme auto`: its bound, its recipe, what it shows and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ssmc
from ssmc.compiler import read_source
from ssmc.recipe import Recipe
from ssmc.runtime.artefact import TENSORS
from ssmc.tuning.trials import held_out_windows

from .conftest import Call, legible
from .test_compile import contents

SHORT = ("--samples", 4, "--length", 16, "--device", "cpu", "--backend", "reference")
PASSES = ("--passes", "absmax,quantise{group=8}")
BOUND = 1.0  # per cent
AUTO = ("--scheme", "auto", "--search-windows", 4, "--candidates", "w8a8,w4a16,float")


def _given(folder: Path) -> tuple[Any, ...]:
    return (folder, "--calibration", folder / "text.txt", *SHORT, *PASSES)


def test_the_bound_holds_and_the_recipe_repeats(
    call: Call, tiny_folder: Path, tmp_path: Path
) -> None:
    given, auto = _given(tiny_folder), (*AUTO, "--max-loss", f"{BOUND}%")
    files = ("-o", tmp_path / "auto", "--write-recipe", tmp_path / "auto.yaml")
    data = call("compile", *given, *auto, *files, "--json").json
    eight = call("compile", *given, "-o", tmp_path / "w8a8", "--json").json
    assert data["size"][TENSORS] < eight["size"][TENSORS]
    assert {"w8a8", "w4a16"} <= {*data["search"]["formats"].values()}
    assert _loss(tiny_folder, tmp_path / "auto") == pytest.approx(
        data["search"]["found"]["perplexity"], rel=1e-3, abs=1e-6
    )
    assert _loss(tiny_folder, tmp_path / "auto") <= BOUND / 100
    for number, recipe in enumerate((tmp_path / "auto" / "ssmc.json", tmp_path / "auto.yaml")):
        again = tmp_path / f"again{number}"
        call("compile", tiny_folder, "--recipe", recipe, "--device", "cpu", "-o", again)
        assert contents(again) == contents(tmp_path / "auto")
    written = yaml.safe_load((tmp_path / "auto.yaml").read_text())
    assert written["passes"][-1]["quantise"]["overrides"] == data["search"]["overrides"]


def _loss(folder: Path, out: Path) -> float:
    """The increase of perplexity of an artefact on the windows its search scored."""
    recipe = Recipe.model_validate(ssmc.load(out).about["recipe"])
    source = read_source(str(folder), recipe)
    windows = held_out_windows(source, recipe, None, 4)
    losses = []
    for model in (source.graph, ssmc.load(out)):
        logits = model(windows[:, :-1])[0].transpose(1, 2)
        losses.append(torch.nn.functional.cross_entropy(logits, windows[:, 1:]))
    return float((losses[1] - losses[0]).exp() - 1)


def test_what_it_shows(call: Call, tiny_folder: Path, tmp_path: Path) -> None:
    ended = call("compile", *_given(tiny_folder), *AUTO, "--max-loss", "1%", "-o", tmp_path / "o")
    lines = legible(ended)
    assert any(line.startswith("found        loses ") for line in lines)
    rows = [line.split() for line in lines if line.startswith("layer.")]
    assert [row[0] for row in rows] == ["layer.0", "layer.1", "layer.2"]
    assert all(len(row) == 7 for row in rows)
    assert "searching: " in ended.err


def test_dry_run_shows_the_search_without_running_it(call: Call, tiny_folder: Path) -> None:
    given = (*_given(tiny_folder), *AUTO, "--max-loss", "1 %", "--dry-run")
    lines = legible(call("compile", *given))
    assert "search       w8a8, w4a16, float for each operator, at most 200 variants" in lines
    data = call("compile", *given, "--json").json
    assert data["search"]["max_loss"] == 0.01
    assert data["search"]["windows"] == 4


def test_a_bound_out_of_reach(call: Call, tiny_folder: Path, tmp_path: Path) -> None:
    auto = (*AUTO, "--candidates", "w4a8,w8a8", "--max-loss", "0%")
    ended = call("compile", *_given(tiny_folder), *auto, "-o", tmp_path / "out")
    assert ended.code == 1
    message = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(message) == 1
    assert "no choice of w4a8, w8a8 loses at most 0.00 %: the best of" in message[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scheme", "auto"), "--scheme auto needs a bound"),
        (("--scheme", "auto", "--max-loss", "0.5"), "--max-loss 0.5 is no percentage"),
        (("--scheme", "auto", "--max-loss", "-1%"), "--max-loss -1% is no percentage"),
        (("--scheme", "auto", "--max-loss", "much%"), "--max-loss much% is no percentage"),
        (("--scheme", "auto", "--max-loss", "inf%"), "--max-loss inf% is no percentage"),
        (("--max-loss", "1%"), "are for --scheme auto"),
        (("--candidates", "w8a8"), "are for --scheme auto"),
        (("--write-recipe", "nowhere/recipe.yaml"), "cannot write nowhere/recipe.yaml"),
        (("--scheme", "auto", "--max-loss", "1%", "--candidates", "w8"), "'w8' is no format"),
        (("--scheme", "auto", "--max-loss", "1%", "--samples", 64), "calibration uses all"),
    ],
)
def test_what_is_refused(
    call: Call, tiny_folder: Path, tmp_path: Path, options: tuple[Any, ...], message: str
) -> None:
    ended = call("compile", *_given(tiny_folder), *options, "-o", tmp_path / "out")
    assert ended.code == 2
    assert message in ended.error
