"""Store A itself instead of its logarithm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ssmc.core import Graph, Match, Pass, op, register


@register
@dataclass(frozen=True)
class FoldALog(Pass):
    """Compute A = -exp(A_log) once, so that the scan reads a constant.

    Replaces:  selective_scan(u, dt, neg(exp(A_log)), ...)
    With:      selective_scan(u, dt, A, ...)

    Mamba (Gu and Dao 2023), section 3.6: A is stored as A_log for training only.
    """

    name = "fold-a-log"
    stage = "rewrite"
    preserves = ("linears",)
    exact_to = 0.0
    rules = ((op.neg(op.exp("A_log")), "fold"),)

    def fold(self, g: Graph, m: Match) -> fx.Node | None:
        """Make the value a parameter named A beside A_log."""
        if m.A_log.op != "get_attr":
            return g.skip(m.node, "its operand is computed, not a parameter")
        name = str(m.A_log.target)
        name = name.removesuffix("_log") if name.endswith("_log") else f"{name}_A"
        return g.new_param(name, -torch.exp(g.param(m.A_log).to(g.runs_on).float()))
