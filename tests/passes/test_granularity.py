"""The granularities of the baselines: scales by the token, and what shares a scale in weights."""

from __future__ import annotations

import pytest
from core.tiny import KINDS, apply, error, graph, logits

from ssmc.core import Graph
from ssmc.core.dialect import operands
from ssmc.errors import UsageError

from .quantised import form


def quantised(kind: str, options: str) -> Graph:
    g = graph(kind)
    apply(g, f"absmax,quantise{{{options}}}")
    return g


def forms(g: Graph, index: int) -> set[str]:
    """How the inputs (0) or the weights (1) of all linear layers are quantised."""
    return {form(g, n.args[index]) for n in g.calls("ssmc::linear")}


@pytest.mark.parametrize("kind", KINDS)
def test_by_the_token_linear_layers_alone(kind: str) -> None:
    g = graph(kind)
    record = apply(g, "absmax,quantise{granularity=token}")["quantise"]
    assert forms(g, 0) == {"token"}
    assert {f.endswith(", 1]") for f in forms(g, 1)} == {True}
    assert not g.calls("ssmc::quantize")
    for scan in (*g.calls("ssmc::selective_scan"), *g.calls("ssmc::ssd_scan")):
        args = operands(scan)
        assert {form(g, args.get("u") or args["x"]), form(g, args["dt"])} == {"float"}
    assert {form(g, n.args[0]) for n in g.calls("ssmc::causal_conv1d")} == {"float"}
    reasons = {s["reason"] for s in record.skipped}
    assert reasons == {"granularity=token leaves scans and convolutions in float"}


@pytest.mark.parametrize("granularity", ["free", "tensor", "token"])
def test_what_shares_a_scale_in_weights(granularity: str) -> None:
    default = "tensor" if granularity == "tensor" else "row"
    for asked in ("row", "tensor", None):
        option = f",weight_scale={asked}" if asked else ""
        g = quantised("mamba2", f"granularity={granularity}{option}")
        one = {f == "int8[]" for f in forms(g, 1)}
        assert one == {(asked or default) == "tensor"}
        (embedding,) = g.calls("ssmc::embedding")
        assert (form(g, embedding.args[1]) == "int8[]") == ((asked or default) == "tensor")


def test_groups_go_before_a_scale_a_tensor() -> None:
    g = quantised("mamba2", "granularity=tensor,weights=4,group=8")
    packed = g.calls("ssmc::dequantize_groups")
    assert packed
    assert {tuple(g.param(n.args[1]).shape)[1] > 1 for n in packed} == {True}  # type: ignore[arg-type]


def test_rows_err_less_than_tensors() -> None:
    g = graph("mamba")
    apply(g, "fold-norm,fold-a-log")
    expected, errors = logits(g), []
    for scale in ("row", "tensor"):
        twin = g.copy()
        apply(twin, f"absmax,quantise{{granularity=token,weight_scale={scale}}}")
        errors.append(error(logits(twin), expected))
    assert errors[0] < errors[1]


@pytest.mark.parametrize("options", ["granularity=tokens", "weight_scale=column"])
def test_other_values_are_refused(options: str) -> None:
    with pytest.raises(UsageError, match=options.partition("=")[0]):
        quantised("mamba", options)
