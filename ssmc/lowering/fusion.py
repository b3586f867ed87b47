"""From int8 operators and what surrounds them to fused ones (`ssmc.ops.fused_*`), for any length.

Each fused operator is one kernel: it reads a row once and hands on integers.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from ssmc.core import Graph, Match, is_call
from ssmc.core.dialect import operands
from ssmc.core.pattern import op
from ssmc.lowering.regions import (
    BITS,
    dynamic_rounding,
    full_scale,
    heads,
    is_static,
    joined_scale,
    only_user,
    results,
    rounding,
    same_shape,
    segments,
    taken,
)
from ssmc.lowering.rewriter import Rules

Values = Mapping[fx.Node, fx.Node]


# -- norms and rotations ----------------------------------------------------------------------


def _norm(g: Graph, m: Match) -> fx.Node:
    return g.call("ssmc::rms_norm_quantize", m.x, m.weight, m.eps, like=m.node)


def _add_norm(g: Graph, m: Match) -> Values | None:
    if not same_shape(m.x, m.residual) or not taken(m.node):
        return None
    pair, args = taken(m.node), (m.x, m.residual, m.weight, m.eps)
    with g.before(m.total):
        call = g.call("ssmc::add_rms_norm_quantize", *args, like=m.node, suffix="fused")
    return results(g, call, (m.total, pair.get(0), pair.get(1)))


def _hadamard(g: Graph, m: Match) -> fx.Node:
    return g.call("ssmc::hadamard_quantize", m.x, m.block, like=m.node)


def _gated_norm(g: Graph, m: Match) -> fx.Node | None:
    if not is_static(m.gate_scale, m.x.meta["val"].shape[-1:]):
        return None
    args = (m.x, m.gate_q, m.gate_scale, m.weight, m.eps, m.group_size, m.norm_before_gate)
    return g.call("ssmc::gated_norm_quantize", *args, m.captures.get("block", 1), like=m.node)


# -- products ---------------------------------------------------------------------------------


def _linear_add(g: Graph, m: Match) -> fx.Node | None:
    if not same_shape(m.linear, m.residual):
        return None
    return g.call("ssmc::int8_linear_add", *operands(m.linear).values(), m.residual, like=m.node)


def _linear_quantize(g: Graph, m: Match) -> Values | None:
    parts = segments(m.node)
    roundings = [r for part in parts if (r := rounding(part)) is not None]
    if len(roundings) != len(parts) or m.node.meta["val"].dim() != 3:
        return None
    args = (*operands(m.node).values(), joined_scale(g, m.node, roundings))
    call = g.call("ssmc::int8_linear_quantize", *args, like=m.node, suffix="fused")
    if len(parts) == 1:
        return {roundings[0]: call}
    sizes = [part.meta["val"].shape[-1] for part in parts]
    with g.after(call):
        split = g.call("split", call, sizes, -1, like=m.node, suffix="split")
    return results(g, split, roundings)


def _linear_split(g: Graph, m: Match) -> Values | None:
    parts = segments(m.node)
    roundings = [r for part in parts if (r := dynamic_rounding(part)) is not None]
    if len(parts) == 1 or len(roundings) != len(parts):
        return None
    sizes = [part.meta["val"].shape[-1] for part in parts]
    args = (*operands(m.node).values(), sizes)
    call = g.call("ssmc::int8_linear_split", *args, like=m.node, suffix="fused")
    return results(g, call, [taken(r).get(i) for r in roundings for i in (0, 1)])


# -- convolution ------------------------------------------------------------------------------


def _conv_quantize(g: Graph, m: Match) -> Values | None:
    used = taken(m.node)
    u_q = rounding(used[0]) if 0 in used else None
    if u_q is None:
        return None
    out_scale = full_scale(g, operands(u_q)["scale"], used[0].meta["val"].shape[-1:])
    args = (*operands(m.node).values(), out_scale)
    call = g.call("ssmc::int8_causal_conv1d_quantize", *args, like=m.node, suffix="fused")
    return results(g, call, (u_q, used.get(1)))


def _conv_split(g: Graph, m: Match) -> Values | None:
    """The channels x, B and C of a Mamba-2 mixer: x rounded statically, B and C by the token."""
    used = taken(m.node)
    parts = [heads(part) for part in segments(used[0])] if 0 in used else []
    if len(parts) != 3 or any(len(shape) != 2 for _, shape in parts):
        return None
    (x, channels), (B, grouped), (C, grouped_c) = parts
    u_q, B_pair, C_pair = rounding(x), dynamic_rounding(B), dynamic_rounding(C)
    if u_q is None or B_pair is None or C_pair is None or grouped != grouped_c:
        return None
    out_scale = full_scale(g, operands(u_q)["scale"], channels)
    args = (*operands(m.node).values(), out_scale, grouped[0])
    call = g.call("ssmc::int8_causal_conv1d_split", *args, like=m.node, suffix="fused")
    pairs = [taken(pair).get(i) for pair in (B_pair, C_pair) for i in (0, 1)]
    return results(g, call, (u_q, *pairs, used.get(1)))


# -- scan -------------------------------------------------------------------------------------


def _ssd_scan_state(g: Graph, m: Match) -> Values | None:
    """The casts around a scan, of a state of 16 bits and of the new one, belong to it."""
    given, used = operands(m.node), taken(m.node)
    wide, new_wide = given["state"], used.get(1)
    if not is_call(wide, "to_dtype") or new_wide is None:
        return None
    state, new_state = wide.args[0], only_user(new_wide, "to_dtype")
    if new_state is None or new_state.args[1] != state.meta["val"].dtype:
        return None
    args = (given | {"state": state}).values()
    call = g.call("ssmc::int8_ssd_scan_state", *args, like=m.node, suffix="fused")
    return results(g, call, (used.get(0), new_state))


_NORM = op.rms_norm("x", "weight", "eps", sole_user=True)
_SUM = op.add("residual", "x", label="total")
_NORM_OF_SUM = op.rms_norm(_SUM, "weight", "eps", sole_user=True)
_GATE = op.dequantize("gate_q", "gate_scale")
_GATED_NORM = op.rms_norm_gated(
    "x", _GATE, "weight", "eps", "group_size", "norm_before_gate", sole_user=True
)
_LINEAR = op.int8_linear(sole_user=True, label="linear")

FUSIONS: Rules = (
    (op.quantize_dynamic(_NORM_OF_SUM, BITS), _add_norm),
    (op.quantize_dynamic(_NORM, BITS), _norm),
    (op.quantize_dynamic(op.hadamard(_GATED_NORM, "block", sole_user=True), BITS), _gated_norm),
    (op.quantize_dynamic(_GATED_NORM, BITS), _gated_norm),
    (op.quantize_dynamic(op.hadamard("x", "block", sole_user=True), BITS), _hadamard),
    (op.add("residual", _LINEAR), _linear_add),
    (op.add(_LINEAR, "residual"), _linear_add),
    (op.int8_linear(), _linear_quantize),
    (op.int8_causal_conv1d(), _conv_quantize),
)
"""Fusions for any length and, as the basis of further ones, for one position."""

SPLITS: Rules = (
    (op.int8_linear(), _linear_split),
    (op.int8_causal_conv1d(), _conv_split),
    (op.int8_ssd_scan(), _ssd_scan_state),
)
"""Results that fall into segments with a scale each, and scans with the casts of their states. In
decoding, where these go into one step of the scan, they come after the rules for steps."""
