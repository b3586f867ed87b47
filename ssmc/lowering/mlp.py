"""Fusions between the products of gated MLPs and of mixtures of experts, for any length."""

from __future__ import annotations

from torch import fx

from ssmc.core import Graph, Match
from ssmc.core.dialect import operands
from ssmc.core.pattern import op
from ssmc.lowering.regions import BITS, same_shape
from ssmc.lowering.rewriter import Rules


def _gate(g: Graph, m: Match) -> fx.Node | None:
    if not same_shape(m.gate, m.up):
        return None
    args = (m.gate, m.up, m.captures.get("block", 1))
    return g.call("ssmc::silu_mul_quantize", *args, like=m.node)


def _router(g: Graph, m: Match) -> fx.Node | None:
    if m.dim not in (-1, m.x.meta["val"].dim() - 1):
        return None
    return g.call("ssmc::softmax_top_k", m.x, m.k, like=m.node)


def _experts_sum(g: Graph, m: Match) -> fx.Node | None:
    index, weights = operands(m.experts)["index"], m.weights.meta["val"]
    if weights.shape != index.meta["val"].shape or m.dim not in (-1, weights.dim()):
        return None
    args = (*operands(m.experts).values(), m.weights)
    return g.call("ssmc::int8_expert_linear_sum", *args, like=m.node)


def _experts_add(g: Graph, m: Match) -> fx.Node | None:
    if not same_shape(m.sum, m.residual):
        return None
    args = [*operands(m.sum).values()]
    return g.call("ssmc::int8_expert_linear_sum", *args[:-1], m.residual, like=m.node)


_SILU = op.silu("gate", sole_user=True)
_PRODUCTS = (op.mul(_SILU, "up", sole_user=True), op.mul("up", _SILU, sole_user=True))
_SOFTMAX = op.softmax("x", "dim", sole_user=True)
_EXPERTS = op.int8_expert_linear(sole_user=True, label="experts")
_WEIGHTED = op.mul(_EXPERTS, op.unsqueeze("weights", "dim"), sole_user=True)

_SUM = op.int8_expert_linear_sum(
    "x_q", "x_scale", "w_q", "w_scale", "index", "weights", None, sole_user=True, label="sum"
)

GATES: Rules = (
    *((op.hadamard_quantize(product, "block"), _gate) for product in _PRODUCTS),
    *((op.quantize_dynamic(product, BITS), _gate) for product in _PRODUCTS),
)
"""They come behind the fusions that make `hadamard_quantize`."""

EXPERTS: Rules = (
    (op.top_k(_SOFTMAX, "k"), _router),
    (op.sum(_WEIGHTED, 2, False), _experts_sum),
    (op.add("residual", _SUM), _experts_add),
    (op.add(_SUM, "residual"), _experts_add),
)
"""They come in front of the fusions that make `add_rms_norm_quantize`."""
