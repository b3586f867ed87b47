"""Passes on a hybrid: mixers with inner norms, attention and stacked experts as one plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from core.tiny import WIDTH, apply, error, graph, logits, values
from frontend.models import tokens
from tiny import compile_tiny

import ssmc
from ssmc.core import Graph, is_call
from ssmc.corpus import read_texts, token_windows
from ssmc.evaluate import perplexity
from ssmc.frontend import load_model, trace
from ssmc.ops import dequantize_groups
from ssmc.passes.smooth import factors
from ssmc.runtime import CompiledModel
from ssmc.runtime.verify import verify

from .quantised import form
from .rotation import rotation

FindPath = Callable[[str], Path]
EXPERTS = "model.layers.1.feed_forward.experts"
INNER = 48
EVERYTHING = "hadamard{residual=true},smooth,percentile,quantise,kv-cache"


def test_roles() -> None:
    g = graph("jamba")
    roles = Counter(n.meta["role"] for n in g.nodes if n.meta.get("role"))
    once = ("in_proj", "conv1d", "x_proj", "dt_proj", "scan", "out_proj", "gate_proj", "up_proj")
    once += ("q_proj", "k_proj", "v_proj", "attention", "o_proj", "router", "gate_up_proj")
    once += ("embedding", "head")
    assert roles == Counter(dict.fromkeys(once, 1) | {"down_proj": 2, "norm": 8})
    experts = {n.meta["role"]: n for n in g.calls("ssmc::expert_linear")}
    assert set(experts) == {"gate_up_proj", "down_proj"}
    assert {n.meta["owner"] for n in experts.values()} == {EXPERTS}


def test_norms_are_folded_into_experts_and_router() -> None:
    g = graph("jamba")
    expected, params = logits(g), g.params()
    record = apply(g, "fold-norm")["fold-norm"]
    gamma = params["model.layers.1.pre_ff_layernorm.weight"]
    for name in (f"{EXPERTS}.gate_up_proj", "model.layers.1.feed_forward.router.weight"):
        assert error(g.params()[name], params[name] * gamma) < 1e-6
    reasons = [entry["reason"] for entry in record.skipped]
    assert sum("selective_scan, which reads it, is no linear layer" in r for r in reasons) == 2
    assert error(logits(g), expected) < 2e-6


def test_rotations() -> None:
    g = graph("jamba")
    expected, params = logits(g), g.params()
    record = apply(g, "hadamard{residual=true}")["hadamard"]
    assert len(g.calls("ssmc::hadamard")) == 4  # out_proj, o_proj, and two down_proj
    assert len(record.matched) == 5
    after, h = g.params(), rotation(WIDTH)
    down = h @ params[f"{EXPERTS}.down_proj"] @ rotation(INNER).T
    assert error(after[f"{EXPERTS}.down_proj"], down) < 1e-6
    gamma = params["model.layers.1.pre_ff_layernorm.weight"]
    both = params[f"{EXPERTS}.gate_up_proj"] * gamma @ h.T
    assert error(after[f"{EXPERTS}.gate_up_proj"], both) < 1e-6
    assert error(logits(g), expected) < 3e-6


def test_smoothing_is_the_same_for_all_experts() -> None:
    g = graph("jamba")
    product = next(
        n for n in g.calls("mul") if n.meta["val"].dim() == 4 and n.meta["val"].shape[-1] == INNER
    )
    before, expected, params = values(g, product.name), logits(g), g.params()
    record = apply(g, "smooth")["smooth"]
    largest = before[product.name].flatten(0, -2).abs().amax(0)
    s = factors(largest, [params[f"{EXPERTS}.down_proj"]], 0.5)
    after = g.params()
    assert error(after[f"{EXPERTS}.down_proj"], params[f"{EXPERTS}.down_proj"] * s) < 1e-6
    ratio = after[f"{EXPERTS}.gate_up_proj"] / params[f"{EXPERTS}.gate_up_proj"]
    by_norm = ratio[:, :INNER]
    assert error(by_norm, by_norm[:1, :1].expand_as(by_norm)) < 1e-5
    assert error(ratio[:, INNER:], by_norm / s[:, None]) < 1e-5
    assert not any("experts" in entry["node"] for entry in record.skipped)
    assert error(logits(g), expected) < 3e-6


def _forms(g: Graph) -> dict[str, tuple[str, str]]:
    """How input and weight of each role are quantised in the layer with experts."""
    calls = [n for n in g.nodes if is_call(n, "ssmc::linear", "ssmc::expert_linear")]
    return {
        str(n.meta["role"]): (form(g, n.args[0]), form(g, n.args[1]))
        for n in calls
        if n.meta["layer"] == 1
    }


def test_eight_bits() -> None:
    g = graph("jamba")
    apply(g, "hadamard,quantise")
    assert _forms(g) == {
        "q_proj": ("token", "int8[40, 1]"),
        "k_proj": ("token", "int8[20, 1]"),
        "v_proj": ("token", "int8[20, 1]"),
        "o_proj": ("token", "int8[40, 1]"),
        "router": ("token", "int8[4, 1]"),
        "gate_up_proj": ("token", "int8[4, 96, 1]"),
        "down_proj": ("token", "int8[4, 40, 1]"),
    }
    (scan,) = g.calls("ssmc::selective_scan")
    assert [form(g, scan.args[i]) for i in (0, 1, 3, 4, 6)] == [
        "static[80]", "static[80]", "token", "token", "static[80]",
    ]  # fmt: skip


def test_few_bits_of_stacked_weights() -> None:
    g = graph("jamba")
    records = apply(g, "absmax,quantise{weights=4,group=4,activations=16},gptq")
    packed = {n.meta["role"]: n.args[1] for n in g.calls("ssmc::expert_linear")}
    for role, shape in (("gate_up_proj", (4, 96, 20)), ("down_proj", (4, 40, 24))):
        assert is_call(packed[role], "ssmc::dequantize_groups")
        assert g.param(packed[role].args[0]).shape == shape  # type: ignore[union-attr, arg-type]
    assert (
        form(g, next(n for n in g.calls("ssmc::linear") if n.meta["role"] == "router").args[1])
        == "float"
    )
    assert (records["quantise"].error or 1) < 0.3


def _output_errors(g: Graph, reference: Graph) -> dict[str, list[float]]:
    """By role, the squared error of each expert's outputs on the calibration text."""
    found: dict[str, list[float]] = {}
    for call in reference.calls("ssmc::expert_linear"):
        x, exact, index = (n for n in call.args[:3])
        seen = values(reference, x.name, index.name)  # type: ignore[union-attr]
        each, chosen = seen[x.name].flatten(0, 2), seen[index.name].flatten(0, 2)  # type: ignore[union-attr]
        each = each.unsqueeze(1).expand(*chosen.shape, -1) if each.dim() == 2 else each
        twin = next(n for n in g.calls("ssmc::expert_linear") if n.name == call.name).args[1]
        change = dequantize_groups(*(g.param(p) for p in twin.args[:2])) - reference.param(exact)  # type: ignore[union-attr, arg-type]
        found[call.meta["role"]] = [
            (each[chosen == e] @ change[e].T).square().sum().item() for e in range(4)
        ]
    return found


def test_gptq_takes_each_expert_with_its_own_tokens() -> None:
    few = "quantise{weights=4,group=4,activations=16,embedding=false,head=false}"
    reference, nearest, chosen = (graph("jamba") for _ in range(3))
    apply(reference, "fold-norm")
    apply(nearest, f"absmax,{few}")
    record = apply(chosen, f"absmax,{few},gptq")["gptq"]
    assert {n.name for n in chosen.calls("ssmc::expert_linear")} <= set(record.matched)
    before, after = _output_errors(nearest, reference), _output_errors(chosen, reference)
    for role in ("gate_up_proj", "down_proj"):
        assert all(a < 0.9 * b for a, b in zip(after[role], before[role], strict=True)), role


@pytest.mark.parametrize("pattern", ["layers.1.*.experts.*", "layer.1.down_proj", "router"])
def test_overrides_know_experts(pattern: str) -> None:
    g = graph("jamba")
    record = apply(g, f"quantise{{overrides={pattern}:float}}")["quantise"]
    found = {entry["node"] for entry in record.skipped if "float by" in entry["reason"]}
    assert len(found) == (2 if "*" in pattern else 1)


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    return compile_tiny("jamba", EVERYTHING)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_lowered_is_simulated(compiled: CompiledModel, backend: str) -> None:
    model = CompiledModel(compiled.artefact, backend, "cpu")
    assert model.lowered.kept == []
    found = verify(model, tokens(2, 21))
    operators = {c.operator.removeprefix("ssmc::") for c in found}
    assert operators >= {
        "int8_attention", "int8_expert_linear", "int8_linear", "int8_selective_scan",
    }  # fmt: skip
    assert all(c.agrees for c in found)
    assert backend == "cpu" or all(c.differing == 0 and c.error == 0 for c in found)


def test_token_by_token_as_in_one_call(compiled: CompiledModel) -> None:
    ids = tokens(2, 15)
    expected, _ = compiled(ids)
    session = compiled.session(2)
    steps = torch.stack([session.step(token).clone() for token in ids.split(1, 1)], 1)
    assert error(steps, expected) < 2e-2  # values at the edge of a step are rounded to either


@pytest.mark.slow
@pytest.mark.parametrize("passes", ["hadamard,percentile", "hadamard,percentile,quantise,kv-cache"])
def test_perplexity_of_a_trained_model(
    passes: str, shared_model: FindPath, shared_data: FindPath
) -> None:
    model = load_model(str(shared_model("jamba-11m")))
    assert model.tokenizer is not None
    assert model.eos_token_id is not None
    texts = read_texts(shared_data("test.jsonl"))
    windows = token_windows(model.tokenizer, texts, model.eos_token_id, 512)[:16]
    compiled = ssmc.compile(
        str(model.folder), passes=passes, samples=16, calibration=shared_data("calib512.jsonl")
    )
    before, after = (perplexity(m, windows).perplexity for m in (trace(model.module), compiled))
    assert after / before < 1.005
