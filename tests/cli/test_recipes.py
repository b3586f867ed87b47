"""`ssmc recipes` and `--recipe NAME`: all are listed, compile, verify, say their source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny import write_model

import ssmc
from ssmc.catalogue import builtin_recipes
from ssmc.errors import UsageError
from ssmc.recipe import Recipe, find_recipe

from .conftest import Call, legible

NAMES = sorted(builtin_recipes())
FEW = ("--samples", 2, "--length", 48, "--device", "cpu")


def test_they_are_listed_by_name_with_what_they_are(call: Call) -> None:
    lines = legible(call("recipes"))
    assert [line.split()[0] for line in lines if line.split()[0] in NAMES] == NAMES
    assert {"naive", "dynamic", "smoothquant", "quarot", "quamba", "default"} <= set(NAMES)
    rows = call("recipes", "--json").json["recipes"]
    assert [row["name"] for row in rows] == NAMES
    assert all(row["title"].endswith(".") and row["plan"] for row in rows)


@pytest.mark.parametrize("name", NAMES)
def test_one_is_shown_with_its_source_and_what_differs(call: Call, name: str) -> None:
    shown = "\n".join(legible(call("recipes", name)))
    assert shown == builtin_recipes()[name].read_text().rstrip()
    assert re.search(r"^# Source: .*\n?.*arXiv \d{4}\.\d{5}", shown, re.MULTILINE)
    assert re.search(r"^# Differs: ", shown, re.MULTILINE)


@pytest.fixture(scope="module", params=["mamba", "mamba2"])
def tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_model_compiles_and_verifies(
    call: Call, tiny_model: Path, tmp_path: Path, name: str
) -> None:
    text, out = tiny_model / "text.txt", tmp_path / "out"
    ended = call("compile", tiny_model, "--recipe", name, "--calibration", text, *FEW, "-o", out)
    assert ended.code == 0, ended.err
    named = [p.name for p in find_recipe(name).plan()]
    assert [r["name"] for r in ssmc.load(out).report["passes"]] == named
    assert call("verify", out, "--length", 17, "--text", text).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_embedded_model_compiles(call: Call, tmp_path: Path, name: str) -> None:
    ended = call("compile", "demo", "--recipe", name, *FEW, "-o", tmp_path / "out", "--json")
    assert ended.code == 0, ended.err
    assert ended.json["metrics"]["probe_top1_agreement"] > 0.5


def test_the_same_recipe_gives_the_same_bytes(call: Call, tiny_model: Path, tmp_path: Path) -> None:
    text = tiny_model / "text.txt"
    for name in ("one", "two"):
        asked = ("--recipe", "quamba2-w4a8", "--calibration", text, *FEW, "-o", tmp_path / name)
        assert call("compile", tiny_model, *asked).code == 0
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_the_default_recipe_is_the_default() -> None:
    assert find_recipe("default").plan() == Recipe().plan()


def test_options_go_over_a_named_recipe(call: Call) -> None:
    given = ("--recipe", "default", "--samples", 3, "--scheme", "w3a16", "--dry-run", "--json")
    data = call("compile", "demo", *given).json
    assert data["recipe"]["samples"] == 3
    assert next(p["quantise"] for p in data["plan"] if "quantise" in p)["weights"] == 3


def test_a_file_goes_before_a_recipe_and_a_folder_does_not(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quamba").write_text("passes: [smooth, absmax]\n")
    (tmp_path / "naive").mkdir()
    planned = {
        name: call("compile", "demo", "--recipe", name, "--dry-run", "--json").json["recipe"]
        for name in ("quamba", "naive")
    }
    assert planned["quamba"]["passes"] == ["smooth", "absmax"]
    assert planned["naive"]["passes"][0] == "absmax"


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["recipes", "qamba"], "there is no recipe 'qamba'", "did you mean quamba"),
        (["recipes", "x"], "there is no recipe 'x'", "there are default, dynamic"),
        (["compile", "demo", "--recipe", "qamba"], "cannot read recipe qamba", "mean quamba"),
        (["compile", "demo", "--recipe", "x.yaml"], "cannot read recipe x.yaml", "`ssmc recipes`"),
    ],
)
def test_a_wrong_name_gets_one_message(
    call: Call, arguments: list[str], message: str, hint: str
) -> None:
    ended = call(*arguments)
    assert ended.code == 2
    assert message in ended.error
    assert hint in ended.error


def test_the_python_api_takes_what_the_command_line_takes(tiny_model: Path, tmp_path: Path) -> None:
    text = str(tiny_model / "text.txt")
    few = {"calibration": text, "samples": 2, "length": 48}
    model = ssmc.compile(str(tiny_model), recipe="quamba", **few)  # type: ignore[arg-type]
    expected = find_recipe("quamba", **few)
    assert [p.name for p in find_recipe(model.save(tmp_path / "out") / "ssmc.json").plan()] == [
        p.name for p in expected.plan()
    ]
    assert model.about["recipe"]["samples"] == 2
    other = ssmc.compile(
        str(tiny_model), recipe=builtin_recipes()["quamba"], passes=["hadamard", "absmax"], **few
    )  # type: ignore[arg-type]
    names = [next(iter(p)) for p in other.about["recipe"]["passes"]]
    assert "absmax" in names
    assert "percentile" not in names
    with pytest.raises(UsageError, match="cannot read recipe quambo"):
        ssmc.compile(str(tiny_model), recipe="quambo")
