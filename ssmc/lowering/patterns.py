"""From the quantised graph to fused int8 operators: the patterns, as data.

Each pattern is a float operator between dequantised operands; its fused twin takes the integers
and the scales themselves and gives the same bits. (int4_linear, whose activations are floats, sums
in another order.)
"""

from __future__ import annotations

import torch
from torch import fx

from ssmc.core import Graph, Match
from ssmc.core.dialect import operands
from ssmc.core.pattern import Pattern, op
from ssmc.lowering.rewriter import Rules


def _linear(g: Graph, m: Match) -> fx.Node:
    args = (m.x_q, m.x_scale, m.w_q, m.w_scale, m.bias)
    return g.call("ssmc::int8_linear", *args, like=m.node)


def _linear_int4(g: Graph, m: Match) -> fx.Node:
    return g.call("ssmc::int4_linear", m.x, m.w_q, m.w_scale, m.bias, like=m.node)


def _experts(g: Graph, m: Match) -> fx.Node:
    args = (m.x_q, m.x_scale, m.w_q, m.w_scale, m.index)
    return g.call("ssmc::int8_expert_linear", *args, like=m.node)


def _embedding(g: Graph, m: Match) -> fx.Node:
    return g.call("ssmc::int8_embedding", m.ids, m.w_q, m.w_scale, like=m.node)


def _conv1d(g: Graph, m: Match) -> fx.Node | None:
    if m.state is not None and m.state.op != "placeholder":
        return g.skip(m.node, "its state is computed in the graph, so it may not be int8")
    if m.state is not None:
        g.set_state(m.state, m.state.meta["val"].to(torch.int8))
    activation = operands(m.node)["activation"]
    args = (m.x_q, m.x_scale, m.w_q, m.w_scale, m.bias, m.state, activation)
    return g.call("ssmc::int8_causal_conv1d", *args, like=m.node)


def _attention(g: Graph, m: Match) -> fx.Node:
    args = (m.q, m.k_q, m.k_scale, m.v_q, m.v_scale, m.position, m.scale)
    return g.call("ssmc::int8_attention", *args, like=m.node)


def _selective_scan(g: Graph, m: Match) -> fx.Node:
    rest = operands(m.node)
    z = (m.captures.get("z_q"), m.captures.get("z_scale"))
    args = (m.u_q, m.u_scale, m.dt_q, m.dt_scale, m.A, m.B_q, m.B_scale, m.C_q, m.C_scale)
    tail = (rest[name] for name in ("dt_bias", "state", "softplus", "reverse"))
    return g.call("ssmc::int8_selective_scan", *args, m.D, *z, *tail, like=m.node)


def _ssd_scan(g: Graph, m: Match) -> fx.Node:
    rest = operands(m.node)
    args = (m.u_q, m.u_scale, m.dt_q, m.dt_scale, m.A, m.B_q, m.B_scale, m.C_q, m.C_scale)
    tail = (rest[n] for n in ("D", "dt_bias", "state", "dt_min", "dt_max", "reverse"))
    return g.call("ssmc::int8_ssd_scan", *args, *tail, like=m.node)


def _dequantised(name: str) -> Pattern:
    return op.dequantize(f"{name}_q", f"{name}_scale")


_SCAN = (_dequantised("u"), _dequantised("dt"), "A", _dequantised("B"), _dequantised("C"))
_CONV1D = op.causal_conv1d(
    _dequantised("x"), _dequantised("w"), "bias", "state", "activation", True
)

_INT4 = op.dequantize_groups("w_q", "w_scale", 4, False)
_BFLOAT16 = op.to_dtype(op.to_dtype("x", torch.bfloat16), torch.float32)

RULES: Rules = (
    (op.linear(_dequantised("x"), _dequantised("w"), "bias", True), _linear),
    (op.linear(_dequantised("x"), _INT4, "bias", True), _linear),
    (op.linear(_BFLOAT16, _INT4, "bias", False), _linear_int4),
    (op.expert_linear(_dequantised("x"), _dequantised("w"), "index", True), _experts),
    (op.embedding("ids", _dequantised("w")), _embedding),
    (_CONV1D, _conv1d),
    (op.attention("q", _dequantised("k"), _dequantised("v"), "position", "scale"), _attention),
    (op.selective_scan(*_SCAN, "D", _dequantised("z")), _selective_scan),
    (op.selective_scan(*_SCAN, "D", None), _selective_scan),
    (op.ssd_scan(*_SCAN), _ssd_scan),
)
HEAVY = tuple(dict.fromkeys(pattern.name for pattern, _ in RULES))
