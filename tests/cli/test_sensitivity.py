"""`ssmc sensitivity`: its table, its JSON, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Call, legible

SHORT = ("--samples", 4, "--length", 16, "--device", "cpu")


def test_table(call: Call, tiny_folder: Path) -> None:
    text = ("--calibration", tiny_folder / "text.txt")
    ended = call("sensitivity", tiny_folder, *text, *SHORT, "--by", "operator", "--limit", 2)
    lines = legible(ended)
    assert "scored       2 windows of 16 tokens" in lines
    assert len([line for line in lines if line.startswith("layer.")]) == 3 * 6
    assert "operators: " in ended.err


@pytest.mark.parametrize("flags", [(), ("--leave-out",)])
def test_json(call: Call, tiny_folder: Path, flags: tuple[str, ...]) -> None:
    text = ("--calibration", tiny_folder / "text.txt", "--text", tiny_folder / "text.txt")
    scheme = ("--scheme", "w4a16")
    data = call("sensitivity", tiny_folder, *text, *SHORT, *scheme, *flags, "--json").json
    assert (data["by"], data["leave_out"], data["windows"]) == ("block", bool(flags), 4)
    assert data["quantise"] == "quantise{weights=4,activations=16,group=128,range=mse}"
    kls = [row["score"]["kl"] for row in data["rows"]]
    assert kls == sorted(kls, reverse=not flags)
    assert {row["unit"] for row in data["rows"]} == {
        "embedding", "layer.0", "layer.1", "layer.2", "head",
    }  # fmt: skip
    sizes = {row["score"]["bytes"] for row in data["rows"]}
    assert (max if flags else min)(sizes) != data["everything"]["bytes"]


def test_a_recipe_goes_by_its_name(call: Call, tiny_folder: Path) -> None:
    given = ("--calibration", tiny_folder / "text.txt", *SHORT, "--limit", 1, "--by", "role")
    data = call("sensitivity", tiny_folder, *given, "--recipe", "quamba", "--json").json
    assert data["quantise"] == "quantise{granularity=tensor,embedding=false,head=false}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--by", "blok"), "--by blok is unknown"),
        (("--scheme", "none"), "no pass quantise in the plan"),
        (("--scheme", "w4"), "unknown scheme 'w4'"),
        (("--text", "nowhere.txt"), "cannot read nowhere.txt"),
        (("--samples", 64), "calibration uses all"),
    ],
)
def test_what_is_refused(
    call: Call, tiny_folder: Path, options: tuple[object, ...], message: str
) -> None:
    given = ("--calibration", tiny_folder / "text.txt", *SHORT)
    ended = call("sensitivity", tiny_folder, *given, *options)
    assert ended.code == 2
    assert message in ended.error
