"""Fold the weight of a norm into the linear layers that read it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from ssmc.core import Graph, Match, Pass, is_call, op, register
from ssmc.core.dialect import operands, target_name
from ssmc.passes._transformer import LINEARS, read_by


@register
@dataclass(frozen=True)
class FoldNorm(Pass):
    """Move each norm's weight into the columns of the linear layers behind it, and its bias.

    Replaces:  linear(rms_norm(x, gamma), W)
               linear(layer_norm(x, gamma, beta), W, b)
    With:      linear(rms_norm(x), W * gamma)
               linear(layer_norm(x), W * gamma, b + W beta)

    A norm without a weight commutes with an orthogonal rotation, which rotating the residual
    stream needs (QuaRot, Ashkboos et al. 2024, section 4, after SliceGPT).
    """

    name = "fold-norm"
    stage = "rewrite"
    needs = ("ssm-sites", "linears")
    exact_to = 1e-5
    rules = ((op.rms_norm("x", "gamma"), "fold"), (op.layer_norm("x", "gamma", "beta"), "fold"))

    def fold(self, g: Graph, m: Match) -> fx.Node | None:
        """Scale the columns of every reader's weight; leave the norm where a reader cannot."""
        folded = [operand for operand in (m.gamma, m.captures.get("beta")) if operand is not None]
        if not folded:
            return None
        for operand in folded:
            if operand.op != "get_attr":
                return g.skip(m.node, f"its weight is computed, by {operand.name}")
        for user in read_by(m.node):
            reason = _unfit(user, m)
            if reason:
                return g.skip(m.node, reason)
        return fold_norm(g, m.node)


def _unfit(user: fx.Node, m: Match) -> str | None:
    """Why a reader of a norm cannot take over its weight and bias; None where it can."""
    if not is_call(user, *LINEARS):
        return f"{user.name}, which reads it, is no linear layer"
    weight = operands(user)["weight"]
    if weight.op != "get_attr":
        return f"the weight of {user.name} is computed, by {weight.name}"
    if len(weight.users) > 1:
        return f"the weight of {user.name} is tied: {weight.target}"
    if m.captures.get("beta") is None:
        return None
    if not is_call(user, "ssmc::linear") or user not in m.node.users:
        return f"{user.name} reads a multiple of it or has no bias, so its own bias has no place"
    bias = operands(user)["bias"]
    if bias is not None and (bias.op != "get_attr" or len(bias.users) > 1):
        return f"the bias of {user.name} is computed or tied"
    return None


def fold_norm(g: Graph, norm: fx.Node) -> fx.Node:
    """The same norm without its weight and its bias, which its readers' take over."""
    given = operands(norm)
    gamma, beta = given["weight"], given.get("bias")
    for user in read_by(norm):
        weight = operands(user)["weight"]
        if beta is not None:
            _add_bias(g, user, g.param(weight) @ g.param(beta))
        if gamma is not None:
            g.set_param(weight, g.param(weight) * g.param(gamma))
    kept = given | {"weight": None} | ({"bias": None} if "bias" in given else {})
    with g.before(norm):
        return g.call(target_name(norm.target), *kept.values(), like=norm)


def _add_bias(g: Graph, linear: fx.Node, value: Tensor) -> None:
    bias = operands(linear)["bias"]
    if bias is not None:
        g.set_param(bias, g.param(bias) + value)
    else:
        own = g.new_param(f"{linear.meta['owner']}.bias", value)
        linear.args = tuple((operands(linear) | {"bias": own}).values())
