"""`ssmc bench`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ssmc.bench import random_model, sizes
from ssmc.bench.check import Oracle
from ssmc.bench.sizes import Size

from .conftest import Call, legible

FIELDS = {"target", "kind", "batch", "prompt", "median_ms", "p10_ms", "p90_ms", "n"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a published size, made small."""
    monkeypatch.setitem(sizes.SIZES, "130m", Size("130m", "Mamba1", 64, 2))
    monkeypatch.setattr(random_model, "LENGTH", 8)
    return "130m"


def test_json(call: Call, tiny_artefact: Path, tiny_folder: Path) -> None:
    data = call(
        "bench", tiny_artefact, "--baseline", tiny_folder, "--ttft", "5,9", "--tpot",
        "--ttlt", "5+3", "--batch", "1,2", "-n", 3, "--seed", 4, "--json",
    ).json  # fmt: skip
    found = data["measurements"]
    assert all(m.keys() >= FIELDS for m in found)
    assert [(m["kind"], m["batch"], m["prompt"]) for m in found[::2]] == [
        (kind, batch, prompt)
        for batch in (1, 2)
        for kind, prompt in (("ttft", 5), ("ttft", 9), ("tpot", 16), ("ttlt", 5))
    ]
    assert {m["target"] for m in found[::2]} == {str(tiny_artefact)}
    assert {m["target"] for m in found[1::2]} == {str(tiny_folder)}
    assert all(m["p10_ms"] <= m["median_ms"] <= m["p90_ms"] for m in found)
    assert {m["n"] for m in found} == {3}
    assert all(m["error"] == 0 for m in found[::2])
    assert all(m["speedup"] > 0 for m in found[::2])
    assert data["size"] < data["baseline_size"]
    assert (data["wrong"], data["seed"], data["target"]) == ([], 4, str(tiny_artefact))
    assert {"device", "date", "versions"} <= data.keys()


def test_table_and_plot(call: Call, tiny_artefact: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    lines = legible(call("bench", tiny_artefact, "-n", 2, "--ttft", 4, "--plot", plot))
    assert lines[0].split()[:4] == ["target", "kind", "batch", "prompt"]
    assert any("ttft" in line for line in lines)
    assert lines[-2].startswith(f"weights of {tiny_artefact}")
    assert lines[-1].startswith("peak memory of this process")
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_several_side_by_side(call: Call, tiny_artefact: Path, tiny_folder: Path) -> None:
    other = tiny_artefact.parent / "other"
    if not other.exists():
        shutil.copytree(tiny_artefact, other)
    given = (tiny_folder, tiny_artefact, other)
    ended = call("bench", *given, "--ttft", "4,8", "-n", 2, "--json")
    assert [m["target"] for m in ended.json["measurements"][:3]] == list(map(str, given))
    assert [m["speedup"] is None for m in ended.json["measurements"][:3]] == [True, False, False]
    assert list(ended.json["sizes"]) == list(map(str, given))
    lines = legible(call("bench", *given, "--ttft", 4, "-n", 2))
    assert any(line.startswith("ttft 4, batch 1") for line in lines)
    assert lines[-1].split()[0] == "weights"
    assert lines[-1].count("MB") == 3


def test_size_alone_measures_nothing(call: Call, tiny_artefact: Path) -> None:
    data = call("bench", tiny_artefact, "--size", "--json").json
    assert data["measurements"] == []
    assert data["size"] > 0
    assert legible(call("bench", tiny_artefact, "--size"))[0].startswith("weights of")


def test_without_options(call: Call, tiny_artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = call("bench", tiny_artefact, "-n", 1, "--json").json
    assert [(m["kind"], m["prompt"]) for m in data["measurements"]] == [("ttft", 512), ("tpot", 16)]


@pytest.mark.parametrize("scheme", [None, "w8a8"])
def test_random_weights(call: Call, small: str, scheme: str | None) -> None:
    chosen = ["--scheme", scheme] if scheme else []
    arguments = ("--baseline", "hf", "--ttft", 6, "-n", 2, "--json")
    data = call("bench", "--random-weights", small, *chosen, *arguments).json
    ours, theirs = data["measurements"]
    assert (ours["target"], theirs["target"]) == ("130m w8a8", "transformers float32")
    assert ours["error"] == 0
    assert 4 * data["size"] == pytest.approx(data["baseline_size"], rel=0.1)


def test_transformers_as_the_baseline_of_a_model(call: Call, tiny_folder: Path) -> None:
    ended = call("bench", tiny_folder, "--baseline", "hf", "--ttft", 6, "-n", 2, "--json")
    assert [m["target"] for m in ended.json["measurements"]] == [
        str(tiny_folder),
        "transformers float32",
    ]


def test_wrong_logits(call: Call, tiny_artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Oracle, "error", lambda *given: float("inf"))
    ended = call("bench", tiny_artefact, "--ttft", 5, "--batch", 2, "--json")
    assert ended.code == 1
    assert "batch 2, prompt 5: the logits differ" in ended.err
    assert ended.json["measurements"] == []
    assert [(w["target"], w["kind"], w["batch"], w["prompt"]) for w in ended.json["wrong"]] == [
        (str(tiny_artefact), "ttft", 2, 5)
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "no target"),
        (["nowhere"], 2, "no model 'nowhere'"),
        (["TARGET", "--ttft", "12,x"], 2, "--ttft 12,x"),
        (["TARGET", "--ttft", "0"], 2, "--ttft 0"),
        (["TARGET", "--batch", ""], 2, "--batch"),
        (["TARGET", "--ttlt", "512"], 2, "--ttlt 512"),
        (["TARGET", "--ttlt", "512+0"], 2, "--ttlt 512+0"),
        (["TARGET", "-n", "0"], 2, "-n"),
        (["TARGET", "--scheme", "w8a8"], 2, "--scheme and --passes go with --random-weights"),
        (["TARGET", "--random-weights", "130m"], 2, "stands for the target"),
        (["--random-weights", "28b"], 2, "2.8b"),
        (["TARGET", "--baseline", "TARGET"], 2, "compared with itself"),
        (["TARGET", "demo", "TARGET"], 2, "compared with itself"),
        (["TARGET", "--baseline", "mamba-ssm"], 2, "--random-weights SIZE"),
        (["TARGET", "--baseline", "hf"], 2, "--baseline MODEL"),
        (["TARGET", "--baseline", "hf", "--baseline-dtype", "float8"], 2, "--baseline MODEL"),
        (["TARGET", "--baseline-dtype", "float61"], 2, "float16"),
        (["TARGET", "--backend", "gpu"], 2, "gpu"),
        (["TARGET", "--device", "gpu"], 2, "unknown device 'gpu'"),
        (["TARGET", "--plot", "nowhere/plot.png"], 2, "there is no folder"),
        (["--random-weights", "130m", "--baseline", "mamba-ssm", "--device", "cpu"], 4, "CUDA"),
    ],
)
def test_refuses(
    call: Call, small: str, tiny_artefact: Path, arguments: list[str], code: int, message: str
) -> None:
    given = [str(tiny_artefact) if a == "TARGET" else a for a in arguments]
    ended = call("bench", *given)
    assert ended.code == code, ended.err
    assert message in ended.error
    assert ended.out == ""


def test_refuses_a_scheme(call: Call, small: str) -> None:
    ended = call("bench", "--random-weights", small, "--scheme", "w8a9")
    assert ended.code == 2
    assert "unknown scheme 'w8a9'" in ended.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(call: Call, tiny_artefact: Path) -> None:
    assert call("bench", tiny_artefact, "--device", "cuda").code == 4
