"""Fold the weight of a norm into the linear layers that read it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ssmc.core import Graph, Match, Pass, is_call, op, register
from ssmc.core.dialect import operands
from ssmc.passes._transformer import LINEARS, read_by


@register
@dataclass(frozen=True)
class FoldNorm(Pass):
    """Move each RMSNorm's weight into the columns of the linear layers behind it.

    Replaces:  linear(rms_norm(x, gamma), W)
    With:      linear(rms_norm(x), W * gamma)

    A norm without a weight commutes with an orthogonal rotation, which rotating the residual
    stream needs (QuaRot, Ashkboos et al. 2024, section 4, after SliceGPT).
    """

    name = "fold-norm"
    stage = "rewrite"
    needs = ("ssm-sites", "linears")
    exact_to = 1e-5
    rules = ((op.rms_norm("x", "gamma"), "fold"),)

    def fold(self, g: Graph, m: Match) -> fx.Node | None:
        """Scale the columns of every reader's weight; leave the norm where a reader cannot."""
        if m.gamma is None:
            return None
        if m.gamma.op != "get_attr":
            return g.skip(m.node, f"its weight is computed, by {m.gamma.name}")
        for user in read_by(m.node):
            if not is_call(user, *LINEARS):
                return g.skip(m.node, f"{user.name}, which reads it, is no linear layer")
            weight = operands(user)["weight"]
            if weight.op != "get_attr":
                return g.skip(m.node, f"the weight of {user.name} is computed, by {weight.name}")
            if len(weight.users) > 1:
                return g.skip(m.node, f"the weight of {user.name} is tied: {weight.target}")
        return fold_norm(g, m.node)


def fold_norm(g: Graph, norm: fx.Node) -> fx.Node:
    """The same norm without its weight, which its readers' weights take over."""
    x, gamma, eps = operands(norm).values()
    for user in read_by(norm):
        weight = operands(user)["weight"]
        g.set_param(weight, g.param(weight) * g.param(gamma))
    with g.before(norm):
        return g.call("ssmc::rms_norm", x, None, eps, like=norm)
