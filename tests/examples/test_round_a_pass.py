"""The example of a third-party pass: small, found, run, checked, and it does what it says."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import ssmc
from ssmc.core import Context, Graph, Record, make_plan, passes, run_passes
from ssmc.errors import PassError

from .conftest import EXAMPLES, Run

ROUND_A = "backbone.layers.3.mixer.A"


def test_it_is_small() -> None:
    lines = (EXAMPLES / "round_a_pass" / "round_a.py").read_text().splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 100


def test_ssmc_passes_lists_it(ssmc_with_pass: Run) -> None:
    ran = ssmc_with_pass("passes", "--json")
    assert ran.returncode == 0, ran.stderr
    rows = {row["name"]: row for row in json.loads(ran.stdout)["passes"]}
    assert rows["round-a"]["from"] == "ssmc-round-a 0.1.0"
    assert rows["round-a"]["stage"] == "rewrite"
    assert rows["round-a"]["options"]["bits"]["default"] == 8
    assert rows["hadamard"]["from"] == "ssmc"


def test_its_options_are_checked(ssmc_with_pass: Run) -> None:
    ran = ssmc_with_pass("compile", "demo", "--passes", "round-a{bit=4}", "--dry-run")
    assert ran.returncode == 2
    assert "did you mean bits?" in ran.stderr


def test_compile_runs_it_and_the_artefact_shows_it(ssmc_with_pass: Run, tmp_path: Path) -> None:
    names, small = "round-a,hadamard,absmax", ("--samples", "2", "--length", "64")
    out = tmp_path / "out"
    ran = ssmc_with_pass("compile", "demo", "--passes", names, "-o", str(out), *small)
    assert ran.returncode == 0, ran.stderr
    assert "round-a" in ran.stdout
    model = ssmc.load(out)
    order = [record["name"] for record in model.report["passes"]]
    assert order.index("fold-a-log") < order.index("round-a") < order.index("quantise")
    record = model.report["passes"][order.index("round-a")]
    assert len(record["matched"]) == 8
    assert 0 < record["error"] < record["limit"] == 1e-3
    assert {name.rpartition(".")[2] for name in record["diff"]["params"]} == {"A"}
    with safe_open(out / "model.safetensors", "pt") as stored:
        assert stored.get_tensor(ROUND_A).dtype == torch.bfloat16
    original = ssmc.load_model("demo").module.backbone.layers[3].mixer.A_log
    torch.testing.assert_close(model.graph.params()[ROUND_A], -original.exp(), rtol=2**-8, atol=0)


@pytest.fixture
def round_a(monkeypatch: pytest.MonkeyPatch) -> type[ssmc.Pass]:
    """The class itself, known by its name for the length of a test."""
    monkeypatch.syspath_prepend(EXAMPLES / "round_a_pass")
    cls = importlib.import_module("round_a").RoundA
    monkeypatch.setitem(passes._registered, cls.name, cls)
    return cls


def tiny(architecture: str) -> Graph:
    import transformers as hf

    shape = {"vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 2}
    if architecture == "mamba":
        model = hf.MambaForCausalLM(hf.MambaConfig(**shape, state_size=5))
    else:
        heads = {"num_heads": 6, "head_dim": 8, "n_groups": 1}
        model = hf.Mamba2ForCausalLM(hf.Mamba2Config(**shape, **heads))
    for layer in model.backbone.layers:  # untrained, A holds whole numbers
        layer.mixer.A_log.data += 0.1 * torch.randn_like(layer.mixer.A_log)
    return ssmc.trace(model)


def run(g: Graph, *plan: ssmc.Pass) -> Record:
    context = Context(probe=(torch.randint(0, 31, (2, 9)),))
    return run_passes(g, plan, context).records[-1]


@pytest.mark.parametrize("architecture", ["mamba", "mamba2"])
def test_significant_bits(round_a: type[ssmc.Pass], architecture: str) -> None:
    g = tiny(architecture)
    run(g, *make_plan([ssmc.core.find_pass("fold-a-log")()]))
    exact = g.params()
    assert len(run(g, round_a()).matched) == 2
    names = [name for name in exact if name.endswith(".A")]
    assert len(names) == 2
    for name in names:
        assert torch.equal(g.params()[name], exact[name].bfloat16().float())
        assert not torch.equal(g.params()[name], exact[name])


def test_what_the_bits_cost(round_a: type[ssmc.Pass]) -> None:
    g = ssmc.trace(ssmc.load_model("demo").module)
    ids = torch.randint(0, 8192, (2, 64))
    context = Context(probe=(ids,))
    errors = {
        bits: run_passes(g.copy(), make_plan([round_a(bits=bits)]), context).records[-1].error
        for bits in (8, 7)
    }
    assert 0 < errors[8] < errors[7] < 1e-3
    with pytest.raises(PassError, match=r"round-a: the result on the probe changed by .*e-03"):
        run_passes(g.copy(), make_plan([round_a(bits=4)]), context)


def test_a_computed_a_is_a_reason_to_skip(round_a: type[ssmc.Pass]) -> None:
    record = run(tiny("mamba"), round_a())
    assert record.matched == []
    assert [entry["reason"] for entry in record.skipped] == [
        "its A is computed, not a parameter"
    ] * 2
    assert record.diff.params == {}
