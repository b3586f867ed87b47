"""Where attention, MLPs and mixtures of experts are in a graph, found by following values."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import fx

from ssmc.core import Graph, is_call
from ssmc.core.dialect import operands
from ssmc.passes._follow import computed_by, readers, source
from ssmc.passes.ssm_sites import ACTIVATIONS

LINEARS = ("ssmc::linear", "ssmc::expert_linear")
"""Products with a weight [N, K], or [E, N, K] of stacked experts."""
ATTENTIONS = ("ssmc::attention", "ssmc::int8_attention")
_SCORES = ("softmax", "sigmoid")
_THROUGH = ("ssmc::rotary_embedding", "ssmc::rms_norm")


@dataclass(frozen=True)
class Attention:
    """A call of attention and the linear layers around it; None where there is no such layer."""

    call: fx.Node
    q_proj: fx.Node | None
    k_proj: fx.Node | None
    v_proj: fx.Node | None
    o_proj: fx.Node | None

    def parts(self) -> dict[str, fx.Node]:
        """The calls by role."""
        named = {name: getattr(self, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        return {"attention": self.call} | {n: node for n, node in named.items() if node is not None}


@dataclass(frozen=True)
class GatedMlp:
    """down_proj(act(gate_proj(x)) * up_proj(x)): the product, its factors, the layers around it.

    Shazeer, 'GLU variants improve Transformer', eq. 6. Where one layer gives both factors, it is
    gate_proj and up_proj.
    """

    product: fx.Node
    gate: fx.Node
    up: fx.Node
    gate_proj: fx.Node
    up_proj: fx.Node
    down_proj: fx.Node

    def parts(self) -> dict[str, fx.Node]:
        """The linear layers by role."""
        if self.gate_proj is self.up_proj:
            return {"gate_up_proj": self.up_proj, "down_proj": self.down_proj}
        names = ("gate_proj", "up_proj", "down_proj")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class PlainMlp:
    """down_proj(act(up_proj(x))): what down_proj reads, and the layers around it.

    The activation is one function of single elements or several, as in relu(x) ** 2 (So et al.
    2021, 'Primer', arXiv 2109.08668, section 3).
    """

    product: fx.Node
    up_proj: fx.Node
    down_proj: fx.Node

    def parts(self) -> dict[str, fx.Node]:
        """The linear layers by role."""
        return {"up_proj": self.up_proj, "down_proj": self.down_proj}


def roles(g: Graph) -> dict[fx.Node, str]:
    """The roles of calls of attention, of MLPs and experts, of their routers and of adapters."""
    parts = [found.parts() for found in (*attentions(g), *mlps(g))]
    named = {node: role for named in parts for role, node in named.items()}
    return named | dict.fromkeys(_routers(g), "router") | dict.fromkeys(_adapters(g), "adapter")


def _routers(g: Graph) -> list[fx.Node]:
    """The linear layers whose outputs choose experts, with corrections that balance their load.

    The correction is a parameter added to the scores (Wang et al. 2024, arXiv 2408.15664, eq. 3).
    """
    found = [source(operands(n)["x"]) for n in g.calls("ssmc::top_k")]
    scores = [source(_uncorrected(value)) for value in found]
    logits = [source(s.args[0]) if is_call(s, *_SCORES) else s for s in scores]  # type: ignore[arg-type]
    return [n for n in logits if is_call(n, "ssmc::linear")]


def _uncorrected(value: fx.Node) -> fx.Node:
    values = [operand for operand in value.all_input_nodes if operand.op != "get_attr"]
    return values[0] if is_call(value, "add") and len(values) == 1 else value


def _adapters(g: Graph) -> list[fx.Node]:
    """The layers of low-rank adapters."""
    sums = (_low_rank(n) for n in g.calls("add"))
    return [layer for found in sums if found is not None for layer in found[1:]]


def _adapted(value: fx.Node) -> fx.Node:
    """The call that computes `value`, without a low-rank adapter that is added to it."""
    found = computed_by(value)
    parts = _low_rank(found)
    return found if parts is None else parts[0]


def _low_rank(total: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The layers W, A and B of W x + B (A x) (LoRA, Hu et al. 2021, arXiv 2106.09685, eq. 3)."""
    layers = [computed_by(operand) for operand in total.all_input_nodes]
    if not (is_call(total, "add") and all(is_call(layer, "ssmc::linear") for layer in layers)):
        return None
    for layer, b in itertools.permutations(layers, 2):
        a = source(operands(b)["x"])
        if is_call(a, "ssmc::linear") and _input(a) is _input(layer):
            return layer, a, b
    return None


def _input(layer: fx.Node) -> fx.Node:
    return source(operands(layer)["x"])


def attentions(g: Graph) -> list[Attention]:
    """Every call of attention."""
    return [attention_of(n) for n in g.nodes if is_call(n, *ATTENTIONS)]


def attention_of(call: fx.Node) -> Attention:
    """A call of attention, with the layers around it."""
    given = operands(call)
    q, k, v = (_projection(given[name]) for name in ("q", "k", "v"))
    behind = (n for n in readers(call) if is_call(n, "ssmc::linear"))
    return Attention(call, q, k, v, next(behind, None))


def _projection(value: fx.Node) -> fx.Node | None:
    """The linear layer whose output an operand of attention is, or what its cache appends."""
    while not is_call(value, "ssmc::linear"):
        found = _adapted(value)
        if is_call(found, "ssmc::cache_append", *_THROUGH):
            found = operands(found)["x"]
        if found is value:
            return None
        value = found
    return value


def mlps(g: Graph) -> list[GatedMlp | PlainMlp]:
    """Every MLP, of experts as well."""
    return [*gated_mlps(g), *plain_mlps(g)]


def plain_mlps(g: Graph) -> list[PlainMlp]:
    """Every linear layer that reads an activation, and no more, of what another gives."""
    found = (_plain_mlp(n) for n in g.nodes if is_call(n, *LINEARS))
    return [mlp for mlp in found if mlp is not None]


def _plain_mlp(down: fx.Node) -> PlainMlp | None:
    value = product = operands(down)["x"]
    while is_call(value, *ACTIVATIONS) or _is_power(value):
        value = computed_by(value.all_input_nodes[0])
    if value is product or not is_call(value, *LINEARS):
        return None
    return PlainMlp(product, value, down)


def _is_power(node: fx.Node) -> bool:
    return is_call(node, "pow") and isinstance(node.args[1], int | float)


def gated_mlps(g: Graph) -> list[GatedMlp]:
    """Every product of an activated linear layer and another, that a third reads."""
    found = (gated_mlp(n) for n in g.calls("mul"))
    return [mlp for mlp in found if mlp is not None]


def gated_mlp(product: fx.Node) -> GatedMlp | None:
    """The MLP of a product, if it is one's."""
    down = next((n for n in readers(product) if is_call(n, *LINEARS)), None)
    factors = [n for n in product.args if isinstance(n, fx.Node)]
    if down is None or len(factors) != 2:
        return None
    for gate, up in (factors, factors[::-1]):
        if is_call(gate, *ACTIVATIONS):
            layers = _adapted(gate.all_input_nodes[0]), _adapted(up)
            if all(is_call(layer, *LINEARS) for layer in layers):
                return GatedMlp(product, gate, up, *layers, down)
    return None
