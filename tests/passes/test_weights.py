"""Weights in fewer bits: which layers, what shares a scale, and what is stored."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from core.tiny import KINDS, WIDTH, apply, error, graph, logits

from ssmc.core import Graph, Record, is_call
from ssmc.core.dialect import operands
from ssmc.errors import UsageError
from ssmc.quant.weights import WeightFormat

from .quantised import form

PROJECTIONS = {"in_proj", "out_proj"}
LINEARS = {"mamba": PROJECTIONS | {"x_proj", "dt_proj", "head"}, "mamba2": PROJECTIONS | {"head"}}


def quantised(kind: str, options: str, passes: str = "absmax") -> tuple[Graph, dict[str, Record]]:
    g = graph(kind)
    return g, apply(g, f"{passes},quantise{{{options}}}")


def weight_of(g: Graph, node: torch.fx.Node) -> Any:
    """A weight as it is used, and how it is stored: float, int8, or bits and number of groups."""
    weight = operands(node)["weight"]
    if is_call(weight, "ssmc::dequantize_groups"):
        args = operands(weight)
        assert g.param(args["packed"]).dtype == torch.uint8
        return args["bits"], g.param(args["scale"]).shape[1]
    return "int8" if is_call(weight, "ssmc::dequantize") else "float"


def weights(g: Graph) -> dict[str, Any]:
    """How the weights of linear layers are stored, by role: the same in every layer."""
    found: dict[str, Any] = {}
    for node in g.calls("ssmc::linear"):
        assert found.setdefault(node.meta["role"], weight_of(g, node)) == weight_of(g, node)
    return found


def loss(kind: str, options: str) -> float:
    """The relative error of the logits, against the model before it is quantised."""
    g = graph(kind)
    apply(g, "fold-norm,fold-a-log")
    return error(logits(quantised(kind, options)[0]), logits(g))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_projections_have_the_bits_asked_for(kind: str, bits: int) -> None:
    g, _ = quantised(kind, f"weights={bits},group=8")
    found = weights(g)
    assert found.keys() == LINEARS[kind]
    assert found["in_proj"] == (bits, WIDTH // 8)
    assert found["out_proj"] == (bits, 2 * WIDTH // 8)
    assert {found[role] for role in found.keys() - PROJECTIONS} == {"int8"}
    assert all(form(g, n.args[0]) != "float" for n in g.calls("ssmc::linear"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights_option", [4, 8])
def test_weights_only(kind: str, weights_option: int) -> None:
    g, records = quantised(kind, f"weights={weights_option},activations=16")
    found = weights(g)
    expected = "int8" if weights_option == 8 else (4, 1)
    assert {found[role] for role in PROJECTIONS} == {expected}
    assert found["head"] == "int8"
    assert {found[role] for role in found.keys() - PROJECTIONS - {"head"}} <= {"float"}
    assert not g.calls("ssmc::quantize")
    assert not g.calls("ssmc::quantize_dynamic")
    skipped = {g.node(s["node"]).meta["role"] for s in records["quantise"].skipped}
    assert skipped == found.keys() - PROJECTIONS - {"head"}


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_quantised_layers_are_bfloat16(kind: str) -> None:
    g, _ = quantised(kind, "weights=4,activations=16")
    for node in g.calls("ssmc::linear"):
        rounded = is_call(node.args[0], "to_dtype")
        assert rounded == (weight_of(g, node) != "float")
        if rounded:
            wide, narrow = node.args[0], node.args[0].args[0]  # type: ignore[union-attr]
            assert (wide.args[1], narrow.args[1]) == (torch.float32, torch.bfloat16)  # type: ignore[union-attr]


@pytest.mark.parametrize("activations", [8, 16])
def test_scope_of_all_linear_layers(activations: int) -> None:
    g, records = quantised("mamba", f"weights=4,activations={activations},scope=all")
    found = weights(g)
    assert found.keys() == LINEARS["mamba"]
    assert found.pop("dt_proj") == "int8"  # its width is odd
    assert set(found.values()) == {(4, 1)}
    assert records["quantise"].notes == ["dt_proj keeps 8 bits: 3 is no multiple of 2"]


def test_a_tied_head_shares_8_bits_with_the_embedding_and_no_others() -> None:
    for options, shared in (("activations=16,scope=all", True), ("weights=4,scope=all", False)):
        g, _ = quantised("mamba", options)
        (lookup,) = g.calls("ssmc::embedding")
        assert (lookup.args[1] is g.node("lm_head").args[1]) == shared
        assert weight_of(g, lookup) == "int8"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("group=8", WeightFormat(4, 8)),
        ("", WeightFormat(4)),
        ("granularity=tensor", WeightFormat(4, tensor=True)),
        ("granularity=tensor,group=8", WeightFormat(4, 8)),
        ("range=mse", WeightFormat(4, range="mse")),
        ("range=tanh,group=8", WeightFormat(4, 8, range="tanh")),
        ("range=tanh", WeightFormat(4, range="tanh")),
        ("range=tanh,granularity=tensor", WeightFormat(4, tensor=True, range="tanh")),
    ],
)
def test_what_shares_a_scale(options: str, expected: WeightFormat) -> None:
    plain = graph("mamba2")
    apply(plain, "fold-norm")
    name = "backbone.layers.1.mixer.out_proj.weight"
    weight = plain.params()[name]
    g, _ = quantised("mamba2", f"weights=4,activations=16,{options}".rstrip(","))
    twin = g.node("backbone_layers_1_mixer_out_proj").args[1]
    scale = expected.scales(weight)
    q, s = expected.store(expected.round(weight, scale), scale)
    assert torch.equal(g.params()[f"{name}_int4"], q)
    assert torch.equal(g.params()[f"{name}_scale"], s)
    args = [g.param(a) if isinstance(a, torch.fx.Node) else a for a in twin.args]  # type: ignore[union-attr]
    value = torch.ops.ssmc.dequantize_groups(*args)
    assert torch.equal(value, expected.values(expected.round(weight, scale), scale))


def test_bytes_are_those_of_the_bits() -> None:
    for bits in range(2, 8):
        g, _ = quantised("mamba2", f"weights={bits},group=8,activations=16")
        params = g.params()
        rows = 2 * (2 * WIDTH) + 2 * 8 + WIDTH // 4
        packed = params[f"backbone.layers.0.mixer.in_proj.weight_int{bits}"]
        assert packed.nbytes == rows * WIDTH * bits // 8
        assert "backbone.layers.0.mixer.in_proj.weight" not in params


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activations", [8, 16])
def test_each_bit_more_loses_less(kind: str, activations: int) -> None:
    losses = [loss(kind, f"weights={b},group=8,activations={activations}") for b in range(2, 8)]
    assert all(more < fewer for fewer, more in pairwise(losses)), losses
    assert losses[0] > 3 * losses[2]


@pytest.mark.parametrize("kind", KINDS)
def test_groups_lose_less_than_rows_and_rows_less_than_a_tensor(kind: str) -> None:
    common = "weights=4,activations=16"
    options = [f"{common},granularity=tensor", common, f"{common},group=8"]
    losses = [loss(kind, o) for o in options]
    assert losses[2] < 0.8 * losses[1], losses
    assert losses[1] < losses[0], losses


def test_a_width_that_does_not_fall_into_groups_keeps_8_bits() -> None:
    g, records = quantised("mamba", f"weights=4,group={2 * WIDTH}")
    found = weights(g)
    assert (found["in_proj"], found["out_proj"]) == ("int8", (4, 1))
    assert any("in_proj keeps 8 bits: 40 is no multiple of 80" in n
               for n in records["quantise"].notes)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ("weights=9", "weights has 2 to 8 bits", ""),
        ("weights=1", "weights has 2 to 8 bits", ""),
        ("activations=7", "activations has 8 or 16 bits", ""),
        ("weights=4,group=3", "multiple of 2, which fill whole bytes at 4 bits", "32, 64 and 128"),
        ("weights=3,group=12", "multiple of 8, which fill whole bytes at 3 bits", "group=none"),
        ("group=0", "at least 2", ""),
        ("range=tanh", "levels that are not uniform", "activations=16"),
        ("range=tan", "'absmax', 'mse' or 'tanh'", ""),
        ("scope=al", "'inout' or 'all'", ""),
        ("weigths=4", "no option 'weigths'", "did you mean weights or weight_scale?"),
    ],
)
def test_options_that_do_not_exist(options: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        quantised("mamba", options)
    assert "quantise" in str(caught.value)
    assert hint in (caught.value.hint or "")
