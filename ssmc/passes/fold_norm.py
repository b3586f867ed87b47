"""Fold the weight of a norm into the linear layers that read it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ssmc.core import Graph, Match, Pass, is_call, op, register


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
        for user in m.node.users:
            if not is_call(user, "ssmc::linear"):
                return g.skip(m.node, f"{user.name}, which reads it, is no linear layer")
            if len(user.args[1].users) > 1:  # type: ignore[union-attr]
                return g.skip(m.node, f"the weight of {user.name} is tied: {user.args[1].target}")  # type: ignore[union-attr]
        return fold_norm(g, m.node)


def fold_norm(g: Graph, norm: fx.Node) -> fx.Node:
    """The same norm without its weight, which its readers' weights take over."""
    x, gamma, eps = norm.args
    for user in list(norm.users):
        weight: fx.Node = user.args[1]  # type: ignore[assignment]
        g.set_param(weight, g.param(weight) * g.param(gamma))  # type: ignore[arg-type]
    with g.before(norm):
        return g.call("ssmc::rms_norm", x, None, eps, like=norm)
