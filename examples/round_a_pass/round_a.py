"""A pass for ssmc: A of the state-space models in fewer significant bits."""

from dataclasses import dataclass

import torch
from ssmc import Graph, Match, Pass, op, register


@register
@dataclass(frozen=True)
class RoundA(Pass):
    """Round A to `bits` significant bits; with 8 or fewer it is stored as bfloat16."""

    name, stage = "round-a", "rewrite"
    needs = ("fold-a-log",)
    exact_to = 1e-3
    bits: int = 8
    rules = ((op.selective_scan("u", "dt", "A"), "round"), (op.ssd_scan("x", "dt", "A"), "round"))

    def round(self, g: Graph, m: Match) -> torch.fx.Node | None:
        if m.A.op != "get_attr":
            return g.skip(m.node, "its A is computed, not a parameter")
        mantissa, exponent = torch.frexp(g.param(m.A))
        g.set_param(m.A, torch.ldexp((mantissa * 2**self.bits).round(), exponent - self.bits))
        return m.node
