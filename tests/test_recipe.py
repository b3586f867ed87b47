"""Recipes: read, checked, planned, and the same again from an artefact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ssmc.errors import UsageError
from ssmc.recipe import Recipe, make_recipe, read_recipe


def write(folder: Path, text: str | bytes, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_reads_yaml(tmp_path: Path) -> None:
    text = "passes:\n  - hadamard: {block: 16}\n  - percentile\nsamples: 3\nlength: 40\n"
    recipe = read_recipe(write(tmp_path, text))
    assert (recipe.samples, recipe.length, recipe.seed, recipe.scheme) == (3, 40, 0, "w8a8")
    named = [str(p) for p in recipe.plan()]
    assert "hadamard{block=16}" in named
    assert named[-1] == "quantise"


def test_options_go_over_the_file(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, "samples: 3\nseed: 5\n"), samples=9, seed=None)
    assert (recipe.samples, recipe.seed) == (9, 5)


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    assert read_recipe(write(tmp_path, "")) == Recipe()


def test_a_text_of_passes_and_a_list_plan_the_same() -> None:
    text = make_recipe(passes="hadamard{block=16},percentile{p=0.999}")
    listed = make_recipe(passes=[{"hadamard": {"block": 16}}, {"percentile": {"p": 0.999}}])
    assert text.plan() == listed.plan()


def test_no_scheme_adds_nothing() -> None:
    plan = make_recipe(passes="fold-norm", scheme="none").plan()
    assert {p.stage for p in plan} == {"analyse", "rewrite"}
    assert make_recipe(passes="quantise{head=false}").plan()[-1].options()["head"] is False


def test_an_artefact_holds_its_recipe(tiny_artefact: Path) -> None:
    recipe = read_recipe(tiny_artefact / "ssmc.json")
    about = json.loads((tiny_artefact / "ssmc.json").read_text())
    assert recipe.model_dump() == about["recipe"]
    assert [p.name for p in recipe.plan()] == [next(iter(p)) for p in about["recipe"]["passes"]]


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("sample: 3", "recipe.yaml: sample: unknown field", "did you mean samples?"),
        ("wher: 3\n", "recipe.yaml: wher: unknown field", None),
        ("where: 3\n", "recipe.yaml: where: unknown field", None),
        ("1: 3\n", "recipe.yaml: 1: unknown field", "there are passes"),
        ("samples: few", "recipe.yaml: samples: Input should be a valid integer", None),
        ("samples: 0", "recipe.yaml: samples: Input should be greater than or equal to 1", None),
        ("length: 1", "recipe.yaml: length: Input should be greater", None),
        ("seed: -1", "recipe.yaml: seed: Input should be greater", None),
        ("seed: 99999999999999999999", "recipe.yaml: seed: Input should be less", None),
        ("passes: 3", "recipe.yaml: passes: neither text nor a list", None),
        ("passes: [1]", "recipe.yaml: passes: neither text nor a list", None),
        ("passes: [{hadamard: 16}]", "recipe.yaml: passes: neither text nor a list", None),
        ("backend: cpuu", "recipe.yaml: backend: unknown backend 'cpuu'", "did you mean cpu?"),
        ("backend: x", "recipe.yaml: backend: unknown backend 'x'", "there are auto, reference"),
        ("- hadamard", "recipe.yaml is not a mapping", "write `passes"),
        ("a: [", "recipe.yaml is not YAML: .*line 1", None),
        (b"\xff\xfe\xfa", "recipe.yaml is not YAML", None),
        ("!!python/object/apply:os.mkdir [executed]", "recipe.yaml is not YAML", None),
    ],
)
def test_a_wrong_recipe_is_named_with_its_field(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str | bytes,
    message: str,
    hint: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        read_recipe(write(tmp_path, text))
    assert hint is None or hint in (caught.value.hint or "")
    assert "\n" not in str(caught.value)
    assert not Path("executed").exists()


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read recipe .*nowhere.yaml: No such file"):
        read_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(UsageError, match="Is a directory"):
        read_recipe(tmp_path)


@pytest.mark.parametrize(
    ("data", "message", "hint"),
    [
        ({"scheme": "w8a9"}, "unknown scheme 'w8a9'", "did you mean w8a8"),
        (
            {"scheme": "x"},
            "unknown scheme 'x'",
            "there are w8a8, w4a8, w8a16, w4a16, w3a16, w2a16, none",
        ),
        ({"passes": "hadamrd"}, "unknown pass 'hadamrd'", "did you mean hadamard?"),
        ({"passes": "hadamard{blok=3}"}, "has no option 'blok'", "did you mean block?"),
        ({"passes": "percentile,hadamard"}, "impossible order", "--passes hadamard,percentile"),
        ({"passes": "hadamard,hadamard"}, "named twice", ""),
    ],
)
def test_a_recipe_that_cannot_be_planned(data: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        make_recipe(**data).plan()
    assert hint in (caught.value.hint or "")
