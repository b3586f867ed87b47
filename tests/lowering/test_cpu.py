"""The rules of the backend `cpu` for attention and experts: what they fuse, and that bits stay."""

from __future__ import annotations

import pytest
import torch
from frontend.models import tokens
from tiny import compile_tiny

from ssmc.lowering import Backend, Form, lower
from ssmc.lowering.backends import cpu
from ssmc.runtime import CompiledModel

from .rules import calls, clones, same_states

PASSES = ["hadamard,percentile", "percentile", "hadamard,percentile,quantise,kv-cache"]
RULES = Backend("rules", rules=cpu.COMPILED.rules, step_rules=cpu.COMPILED.step_rules)


@pytest.fixture(scope="module", params=PASSES)
def jamba(request: pytest.FixtureRequest) -> CompiledModel:
    return compile_tiny("jamba", request.param)


@pytest.mark.parametrize("form", ["sequence", "step"])
def test_the_fused_graph_has_the_bits_of_the_plain_one(jamba: CompiledModel, form: Form) -> None:
    plain, program = (lower(jamba.graph, b, form).graph for b in ("reference", RULES))
    _, states = lower(jamba.graph, "reference").graph(tokens(2, 5))
    ids = tokens(2, 1 if form == "step" else 7)
    expected, expected_states = plain(ids, states=clones(states))
    logits, new_states = program(ids, states=clones(states))
    assert torch.equal(logits, expected)
    assert same_states(new_states, expected_states)


def test_nothing_of_a_layer_is_left_to_torch(jamba: CompiledModel) -> None:
    g = lower(jamba.graph, RULES, "step").graph
    layers = sorted({n.meta["layer"] for n in g.nodes if n.meta.get("layer") is not None})
    found = [calls(g, layer) for layer in layers]
    plain = {"silu", "mul", "softmax", "sum", "top_k", "unsqueeze", "add", "to_dtype"}
    assert not any(plain & set(layer) for layer in found)
    assert any("int8_expert_linear_sum" in layer for layer in found)
    assert sum(layer["silu_mul_quantize"] for layer in found) == len(layers)
    assert calls(g)["position_step"] == 1
    caches = sum(spec.name.endswith(("_k", "_v")) for spec in g.states)
    appended = sum(layer["cache_append_step"] + layer["cache_quantize_step"] for layer in found)
    assert appended == caches
