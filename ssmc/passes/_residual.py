"""The residual stream: the sum that blocks read through norms and write through projections."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from ssmc.core import Graph, is_call
from ssmc.core.dialect import operands
from ssmc.errors import PassError
from ssmc.passes._follow import is_scaling, read_by
from ssmc.passes._shared import part
from ssmc.passes._transformer import LINEARS
from ssmc.passes.fold_norm import fold_norms
from ssmc.passes.linears import PLAIN_NORMS

_HINT = "leave residual=true out for this model"


@dataclass
class ResidualStream:
    """The embedding, and the linear layers that read the stream and those that write it.

    The stream has the values of the embedding, their sums with what is written and multiples of
    these by numbers. Values of it beside one another, as in Zamba2, are read like one of them: what
    rotates each rotates both.
    """

    embedding: fx.Node
    values: set[fx.Node]
    norms: list[fx.Node] = field(default_factory=list)
    writing: list[fx.Node] = field(default_factory=list)

    @classmethod
    def find(cls, g: Graph) -> ResidualStream:
        """Follow the stream from the embedding; fold the norms that read it.

        Layers that share a weight, and of which some read or write the stream otherwise, get their
        own. Raises PassError naming the call that keeps the stream from being rotated.
        """
        embeddings = g.calls("ssmc::embedding")
        if len(embeddings) != 1:
            raise PassError(f"the graph has {len(embeddings)} embeddings, not one", hint=_HINT)
        stream = cls(embeddings[0], {embeddings[0]})
        for node in g.nodes:
            if stream._carries(node):
                stream.values.add(node)
        for value in [n for n in g.nodes if n in stream.values]:
            for user in value.users:
                stream._meet(user)
        stream.norms = fold_norms(g, list(dict.fromkeys(stream.norms)))
        stream._part(g)
        if any(is_call(norm, "ssmc::layer_norm") for norm in stream.norms):
            stream._centre(g)
        return stream

    @property
    def readers(self) -> list[fx.Node]:
        """The weights whose columns, or those of whose rows that are looked up, are the stream."""
        return _operands([self.embedding, *self._reading], "weight")

    @property
    def writers(self) -> list[fx.Node]:
        """The weights whose rows give the stream."""
        return _operands(self.writing, "weight")

    @property
    def biases(self) -> list[fx.Node]:
        """The biases of what writes the stream."""
        return _operands(self.writing, "bias")

    @property
    def _reading(self) -> list[fx.Node]:
        return [layer for norm in self.norms for layer in read_by(norm)]

    def _carries(self, node: fx.Node) -> bool:
        found = [operand in self.values for operand in node.all_input_nodes]
        if is_call(node, "cat"):
            return all(found) and node.args[1] in (-1, node.meta["val"].dim() - 1)
        return any(found) and (is_call(node, "add", "to_dtype") or is_scaling(node))

    def _meet(self, user: fx.Node) -> None:
        if user in self.values:
            for operand in user.all_input_nodes:
                if operand not in self.values:
                    self.writing += _layers_behind(operand)
        elif is_call(user, *PLAIN_NORMS):
            for layer in read_by(user):
                if not is_call(layer, *LINEARS):
                    raise PassError(f"{layer.name}, no linear layer, reads {user.name}", hint=_HINT)
            self.norms.append(user)
        else:
            raise PassError(f"{user.name} reads the residual stream without a norm", hint=_HINT)

    def _part(self, g: Graph) -> None:
        """Let no layers share a weight of which one reads or writes the stream and one does not."""
        reading = {self.embedding, *self._reading}
        kinds = {
            layer: (layer in reading, layer in self.writing)
            for layer in (self.embedding, *self._reading, *self.writing)
        }
        part(g, kinds)
        part(g, dict.fromkeys(self.writing, True), "bias")

    def _centre(self, g: Graph) -> None:
        """Let the stream have no mean, so that a LayerNorm is an RMSNorm.

        What writes it gives values without their mean (SliceGPT, Ashkboos et al. 2024, section
        3.2); an RMSNorm in the original would have seen the mean.
        """
        for norm in self.norms:
            if not is_call(norm, "ssmc::layer_norm"):
                raise PassError(f"{norm.name}, an RMSNorm, reads what LayerNorms read", hint=_HINT)
        for value, dim in (
            (operands(self.embedding)["weight"], -1),
            *((weight, -2) for weight in self.writers),
            *((bias, -1) for bias in self.biases),
        ):
            tensor = g.param(value)
            g.set_param(value, tensor - tensor.mean(dim, keepdim=True))
        for i, norm in enumerate(self.norms):
            x, _, _, eps = operands(norm).values()
            with g.before(norm):
                self.norms[i] = g.call("ssmc::rms_norm", x, None, eps, like=norm)
            g.replace(norm, self.norms[i])


def _operands(layers: list[fx.Node], name: str) -> list[fx.Node]:
    """The parameters that are these layers' operand `name`, each once."""
    found = dict.fromkeys(operands(layer).get(name) for layer in layers)
    return [param for param in found if param is not None]


def _layers_behind(value: fx.Node) -> list[fx.Node]:
    """The linear layers, experts among them, whose outputs `value` sums; PassError for others."""
    if is_call(value, "ssmc::linear"):
        return [value]
    if is_call(value, "add") or is_scaling(value):
        return [layer for operand in value.all_input_nodes for layer in _layers_behind(operand)]
    experts = _experts_behind(value)
    if experts is None:
        raise PassError(f"{value.name}, no linear layer, writes the residual", hint=_HINT)
    return [experts]


def _experts_behind(value: fx.Node) -> fx.Node | None:
    """The experts whose outputs, each times a number, `value` is the sum of."""
    product = value.args[0] if is_call(value, "sum") and value.args[1] == 2 else None
    if not isinstance(product, fx.Node) or not is_call(product, "mul"):
        return None
    outputs = [n for n in product.all_input_nodes if is_call(n, "ssmc::expert_linear")]
    weights = [n for n in product.all_input_nodes if n.meta["val"].shape[-1] == 1]
    return outputs[0] if len(outputs) == len(weights) == 1 else None
