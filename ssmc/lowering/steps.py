"""From fused operators to those of `ssmc.ops.steps`, each all that one kernel does for a position.

They overwrite the states of the model, so those have to be its own and used once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ssmc.core import Graph, Match
from ssmc.core.dialect import operands
from ssmc.core.graph import is_call
from ssmc.core.pattern import Pattern, op
from ssmc.lowering.regions import (
    BITS,
    full_scale,
    heads,
    is_model_state,
    is_static,
    only_user,
    results,
    results_of,
    rounding,
    same_scale,
    segment_sizes,
    segments,
    taken,
)
from ssmc.lowering.rewriter import Rules

Values = dict[fx.Node, fx.Node]


# -- norm, in_proj and convolution ------------------------------------------------------------


def _in_proj_conv(g: Graph, m: Match) -> Values | None:
    """Mamba-1: all channels of the convolution are rounded with static scales."""
    used, start = taken(m.node), _conv_start(g, m)
    if start is None or not used:
        return None
    call = _in_proj_conv_call(g, m, start, m.out_scale)
    return results(g, call, (m.q, used.get(0), None, used.get(1)))


def _in_proj_conv_split(g: Graph, m: Match) -> Values | None:
    """Mamba-2: the first channels of the convolution are rounded, the others go to the scan."""
    used, start = taken(m.node), _conv_start(g, m)
    first, *others = segments(used[0]) if 0 in used else [m.node]
    u, channels = heads(first)
    u_q = rounding(u)
    if start is None or not others or u_q is None:
        return None
    call = _in_proj_conv_call(g, m, start, full_scale(g, operands(u_q)["scale"], channels))
    values = results(g, call, (m.q, u_q, None, used.get(1)))
    with g.after(values[u_q]):
        shaped = g.call("unflatten", values[u_q], -1, list(channels), like=u_q)
    return values | _rest(g, call, used[0], others) | {u_q: shaped}


def _rest(g: Graph, call: fx.Node, y: fx.Node, others: list[fx.Node]) -> Values:
    sizes = [other.meta["val"].shape[-1] for other in others]
    with g.after(call):
        rest = g.call("getitem", call, 2, like=y, suffix="rest")
    with g.after(rest):
        split = g.call("split", rest, sizes, -1, like=y, suffix="split")
    return results(g, split, others)


def _conv_start(g: Graph, m: Match) -> int | None:
    """The first channel of in_proj's result that goes into the convolution."""
    sizes = segment_sizes(m.split)
    if sizes is None or not is_model_state(g, m.state):
        return None
    start, width = sum(sizes[: m.index]), sizes[m.index]
    if not is_static(m.x_scale, [width]):
        return None
    part, scale = g.param(m.in_scale)[start : start + width], g.param(m.x_scale)
    return start if torch.equal(part, scale.expand_as(part)) else None


def _in_proj_conv_call(g: Graph, m: Match, start: int, u_scale: fx.Node) -> fx.Node:
    norm_and_linear = (m.x, m.norm_weight, m.eps, m.w_q, m.w_scale, m.bias, m.in_scale)
    conv = (start, m.conv_w_q, m.conv_w_scale, m.conv_bias, m.state, m.activation, u_scale)
    with g.before(m.q):  # everything it reads is there: an input, a state, parameters
        return g.call(
            "ssmc::in_proj_conv_step", *norm_and_linear, *conv, like=m.node, suffix="fused"
        )


# -- scans ------------------------------------------------------------------------------------


def _selective_scan(g: Graph, m: Match) -> Values | None:
    return _selective_step(g, m, "ssmc::selective_scan_step", (m.x_proj,))


def _normed_selective_scan(g: Graph, m: Match) -> Values | None:
    if not m.eps == m.B_eps == m.C_eps:
        return None
    first = (m.x_proj, m.dt_norm, m.B_norm, m.C_norm, m.eps)
    return _selective_step(g, m, "ssmc::normed_selective_scan_step", first)


def _selective_step(g: Graph, m: Match, name: str, first: tuple[Any, ...]) -> Values | None:
    width, rank = m.A.meta["val"].shape
    state, new_state = _states(g, m)
    sizes = segment_sizes(m.split) or []
    if len(sizes) != 3 or sizes[1:] != [rank, rank] or state is None:
        return None
    if not is_static(m.dt_scale, [width]) or not same_scale(g, m.dt_scale, m.dt_out_scale):
        return None
    dt_proj = (m.dt_w_q, m.dt_w_scale, m.dt_proj_bias, m.dt_scale)
    scan = (m.u_q, m.u_scale, m.A, m.D, m.z_q, m.z_scale, m.dt_bias, state, m.softplus)
    call = g.call(name, *first, *dt_proj, *scan, like=m.node, suffix="fused")
    return results(g, call, (taken(m.node).get(0), new_state))


def _ssd_scan(g: Graph, m: Match) -> Values | None:
    state, new_state = _states(g, m)
    whole = len(segment_sizes(m.split) or []) == 2 and list(m.B_shape) == list(m.C_shape)
    if not whole or len(m.B_shape) != 2 or state is None:
        return None
    operands_before = (m.x_q, m.x_scale, m.dt_q, m.dt_scale, m.A, m.BC, m.B_shape[0], m.D)
    args = (*operands_before, m.dt_bias, state, m.dt_min, m.dt_max)
    call = g.call("ssmc::ssd_scan_step", *args, like=m.node, suffix="fused")
    return results(g, call, (taken(m.node).get(0), new_state))


def _states(g: Graph, m: Match) -> tuple[fx.Node | None, fx.Node | None]:
    """The model's state that a scan reads, if it may be overwritten, and the new one.

    A step takes a state of 16 bits as it is: the casts around the scan belong to it.
    """
    state, new_state = m.state, taken(m.node).get(1)
    if is_call(state, "to_dtype") and len(state.users) == 1 and new_state is not None:
        state, new_state = state.args[0], only_user(new_state, "to_dtype")
        if new_state is None or new_state.args[1] != state.meta["val"].dtype:
            return None, None
    return (state, new_state) if is_model_state(g, state) else (None, None)


# -- linear layers ----------------------------------------------------------------------------


def _norm_linear(g: Graph, m: Match) -> fx.Node:
    args = (m.x, m.norm_weight, m.eps, m.w_q, m.w_scale, m.bias)
    return g.call("ssmc::norm_linear_step", *args, like=m.node)


# -- caches ------------------------------------------------------------------------------------


def _append(g: Graph, m: Match) -> fx.Node | None:
    if not is_model_state(g, m.cache):
        return None
    return g.call("ssmc::cache_append_step", m.cache, m.x, m.position, like=m.node)


def _quantize_append(g: Graph, m: Match) -> Values | None:
    """The rows of integers and of scales that are made of the same values."""
    integers = taken(m.pair).get(0)
    append = integers and only_user(integers, "ssmc::cache_append")
    if append is None or not is_model_state(g, m.scales):
        return None
    given = operands(append)
    if not is_model_state(g, given["cache"]) or given["position"] is not m.position:
        return None
    if m.dtype != m.scales.meta["val"].dtype or m.position.op != "placeholder":
        return None
    args = (given["cache"], m.scales, m.x, m.position)
    with g.after(m.pair):
        call = g.call("ssmc::cache_quantize_step", *args, like=m.node, suffix="fused")
    return results(g, call, (append, m.node))


def _position(g: Graph, m: Match) -> fx.Node | None:
    """The count of tokens, written over the old one when nothing is to read that any more."""
    old = m.position.name if isinstance(m.position, fx.Node) else None
    kept = zip(g.states, g.new_states, strict=True)
    if not any(spec.name == old and new is m.node for spec, new in kept) or len(m.node.users) > 1:
        return None
    with g.before(g.nodes[-1]):
        return g.call("ssmc::position_step", m.position, m.tokens, like=m.node)


def _pair(value: Pattern) -> tuple[Pattern, ...]:
    return results_of(op.quantize_dynamic(value, BITS))


def _segment(value: str, index: int) -> Pattern:
    return op.getitem(op.split(value, label="split"), index, sole_user=True)


def _group(index: int, shape: str) -> Pattern:
    return op.unflatten(_segment("BC", index), -1, shape, sole_user=True)


_WEIGHT = ("w_q", "w_scale", "bias")
_NORM = results_of(op.rms_norm_quantize("x", "norm_weight", "eps"))
_IN_PROJ = op.int8_linear_quantize(*_NORM, *_WEIGHT, "in_scale", sole_user=True, label="q")
_CONV_INPUT = op.getitem(op.split(_IN_PROJ, label="split"), "index", sole_user=True)
_CONV = (_CONV_INPUT, "x_scale", "conv_w_q", "conv_w_scale", "conv_bias", "state", "activation")


def _selective(*pairs: tuple[Pattern, ...]) -> Pattern:
    """A scan whose step sizes come from dt_proj, from the integers and scales of dt, B and C."""
    low, B, C = pairs
    dt_proj = ("dt_w_q", "dt_w_scale", "dt_proj_bias", "dt_out_scale")
    dt = op.int8_linear_quantize(*low, *dt_proj, sole_user=True)
    rest = ("D", "z_q", "z_scale", "dt_bias", "state", "softplus", False)
    return op.int8_selective_scan("u_q", "u_scale", dt, "dt_scale", "A", *B, *C, *rest)


def _normed(index: int, weight: str, eps: str) -> tuple[Pattern, ...]:
    return results_of(op.rms_norm_quantize(_segment("x_proj", index), weight, eps))


_SELECTIVE_SCAN = _selective(*(_pair(_segment("x_proj", i)) for i in range(3)))
_NORMED_SCAN = _selective(
    _normed(0, "dt_norm", "eps"), _normed(1, "B_norm", "B_eps"), _normed(2, "C_norm", "C_eps")
)
_SSD_SCAN = op.int8_ssd_scan(
    "x_q", "x_scale", "dt_q", "dt_scale", "A", *_pair(_group(0, "B_shape")),
    *_pair(_group(1, "C_shape")), "D", "dt_bias", "state", "dt_min", "dt_max", False,
)  # fmt: skip

STEPS: Rules = (
    (op.int8_causal_conv1d_quantize(*_CONV, "out_scale"), _in_proj_conv),
    (op.int8_causal_conv1d(*_CONV), _in_proj_conv_split),
    (_SELECTIVE_SCAN, _selective_scan),
    (_SSD_SCAN, _ssd_scan),
    (op.int8_linear(*_NORM, *_WEIGHT), _norm_linear),
    (op.cache_append("cache", "x", "position"), _append),
)

NORMED_SCAN: Rules = ((_NORMED_SCAN, _normed_selective_scan),)

_ROUNDED = op.quantize_dynamic("x", BITS, label="pair")
_SCALE = op.to_dtype(op.getitem(_ROUNDED, 1, sole_user=True), "dtype", sole_user=True)

CACHE_STEPS: Rules = ((op.cache_append("scales", _SCALE, "position"), _quantize_append),)

POSITION_STEP: Rules = ((op.add("position", op.size("ids", 1, label="tokens")), _position),)
"""The last rule of all: what comes behind its call finds the new count."""
