from dataclasses import dataclass

from ssmc import Graph, Match, Pass, op
from torch.fx import Node


@dataclass(frozen=True)
class BalanceConv(Pass):
    """Scale the rows of in_proj to one size by powers of two, which conv1d's kernel takes over."""

    name, stage = "balance-conv", "rewrite"
    strength: float = 0.5
    x = op.getitem(op.split(op.linear("h", "W", "bias"), "sizes"), "part")
    rules = ((op.causal_conv1d(x, "kernel"), "balance"),)

    def balance(self, g: Graph, m: Match) -> Node | None:
        if m.bias is not None:
            return g.skip(m.node, "in_proj has a bias")
        W = g.param(m.W).clone()
        rows = W.split(m.sizes)[m.part]
        s = rows.norm(dim=1, keepdim=True).clamp_min(1e-9).pow(self.strength).log2().round().exp2()
        rows /= s
        g.set_param(m.W, W)
        g.set_param(m.kernel, g.param(m.kernel) * s)
        return m.node
