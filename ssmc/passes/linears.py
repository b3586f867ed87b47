"""Analysis: the linear layers of a graph, what feeds them, and what shares their weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ssmc.core import Context, Graph, Pass, is_call, register
from ssmc.core.dialect import operands
from ssmc.passes._follow import computed_by
from ssmc.passes._transformer import LINEARS, roles

PLAIN_NORMS = ("ssmc::layer_norm", "ssmc::rms_norm")


@dataclass(frozen=True)
class Linear:
    """One call of a linear layer.

    Its input value, its weight (a get_attr node [N, K], of stacked experts [E, N, K]), and the norm
    it reads, if it reads one.
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    norm: fx.Node | None

    @property
    def role(self) -> str:
        """in_proj, x_proj, dt_proj, out_proj; q_proj, k_proj, v_proj, o_proj; head; or linear.

        Of MLPs and experts gate_proj and up_proj, or gate_up_proj, and down_proj; router; adapter.
        """
        return str(self.node.meta.get("role") or "linear")

    @property
    def tied(self) -> bool:
        """Whether another call reads the same weight."""
        return len(self.weight.users) > 1


@register
@dataclass(frozen=True)
class Linears(Pass):
    """Find the linear layers, the embedding, the norms and the head; give each its role.

    Replaces:  nothing
    With:      roles (embedding, norm, head; of attention q_proj, k_proj, v_proj, o_proj; of MLPs
               and experts gate_proj, up_proj, gate_up_proj, down_proj; router; adapter for the two
               layers of a low-rank one; ssm-sites names the others) and the list of linear layers,
               which other passes ask for
    """

    name = "linears"
    stage = "analyse"
    needs = ("ssm-sites",)

    def run(self, g: Graph, context: Context) -> None:
        """List the calls of linear whose weight is a parameter."""
        for node in g.nodes:
            if is_call(node, *PLAIN_NORMS):
                node.meta["role"] = "norm"
            elif is_call(node, "ssmc::embedding"):
                node.meta["role"] = "embedding"
        for node, role in roles(g).items():
            node.meta["role"] = role
        calls = [n for n in g.nodes if is_call(n, *LINEARS)]
        found = [describe(n) for n in calls if operands(n)["weight"].op == "get_attr"]
        results = g.result if isinstance(g.result, tuple | list) else (g.result,)
        heads = {computed_by(r) for r in results}
        for linear in found:
            if linear.node in heads:
                linear.node.meta["role"] = "head"
            g.match(linear.node)
        g.facts[self.name] = found


def describe(node: fx.Node) -> Linear:
    """A call of linear, with what feeds it."""
    args = operands(node)
    norm = computed_by(args["x"])
    return Linear(node, args["x"], args["weight"], norm if is_call(norm, *PLAIN_NORMS) else None)
