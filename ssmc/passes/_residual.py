"""The residual stream: the sum that blocks read through norms and write through projections."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from ssmc.core import Graph, is_call
from ssmc.core.dialect import operands
from ssmc.errors import PassError
from ssmc.passes._transformer import LINEARS, is_scaling, read_by
from ssmc.passes.fold_norm import fold_norm
from ssmc.passes.linears import PLAIN_NORMS

_HINT = "leave residual=true out for this model"


@dataclass
class ResidualStream:
    """The embedding, the weights (get_attr nodes) that read the stream and those that write it."""

    embedding: fx.Node
    values: set[fx.Node]
    readers: list[fx.Node] = field(default_factory=list)
    writers: list[fx.Node] = field(default_factory=list)
    biases: list[fx.Node] = field(default_factory=list)
    norms: list[fx.Node] = field(default_factory=list)

    @classmethod
    def find(cls, g: Graph) -> ResidualStream:
        """Follow the stream from the embedding; fold the norms that read it.

        Raises PassError naming the call that keeps the stream from being rotated.
        """
        embeddings = g.calls("ssmc::embedding")
        if len(embeddings) != 1:
            raise PassError(f"the graph has {len(embeddings)} embeddings, not one", hint=_HINT)
        stream = cls(operands(embeddings[0])["weight"], {embeddings[0]})
        for node in g.nodes:
            if stream._carries(node):
                stream.values.add(node)
        for value in [n for n in g.nodes if n in stream.values]:
            for user in list(value.users):
                stream._meet(g, value, user)
        if any(is_call(norm, "ssmc::layer_norm") for norm in stream.norms):
            stream._centre(g)
        return stream

    def _carries(self, node: fx.Node) -> bool:
        passes_on = is_call(node, "add", "to_dtype") or is_scaling(node)
        return passes_on and any(a in self.values for a in node.all_input_nodes)

    def _meet(self, g: Graph, value: fx.Node, user: fx.Node) -> None:
        if user in self.values:
            self._write(user)
        elif is_call(user, *PLAIN_NORMS):
            self._read(g, user)
        else:
            raise PassError(f"{user.name} reads the residual stream without a norm", hint=_HINT)

    def _write(self, node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            if operand in self.values:
                continue
            for writer in _layers_behind(operand):
                args = operands(writer)
                self._note(self.writers, args["weight"])
                if args.get("bias") is not None:
                    self._note(self.biases, args["bias"])

    def _read(self, g: Graph, norm: fx.Node) -> None:
        for user in read_by(norm):
            if not is_call(user, *LINEARS):
                raise PassError(f"{user.name}, no linear layer, reads {norm.name}", hint=_HINT)
            untie(g, user)
        if any(operands(norm).get(name) is not None for name in ("weight", "bias")):
            folded = fold_norm(g, norm)
            g.replace(norm, folded)
            norm = folded
        self.norms.append(norm)
        for user in read_by(norm):
            self._note(self.readers, operands(user)["weight"])

    def _centre(self, g: Graph) -> None:
        """Let the stream have no mean, so that a LayerNorm is an RMSNorm.

        What writes it gives values without their mean (SliceGPT, Ashkboos et al. 2024, section
        3.2); an RMSNorm in the original would have seen the mean.
        """
        for norm in self.norms:
            if not is_call(norm, "ssmc::layer_norm"):
                raise PassError(f"{norm.name}, an RMSNorm, reads what LayerNorms read", hint=_HINT)
        for value, dim in (
            (self.embedding, -1),
            *((weight, -2) for weight in self.writers),
            *((bias, -1) for bias in self.biases),
        ):
            tensor = g.param(value)
            g.set_param(value, tensor - tensor.mean(dim, keepdim=True))
        for norm in self.norms:
            x, _, _, eps = operands(norm).values()
            with g.before(norm):
                g.replace(norm, g.call("ssmc::rms_norm", x, None, eps, like=norm))

    @staticmethod
    def _note(weights: list[fx.Node], weight: fx.Node) -> None:
        if weight not in weights:
            weights.append(weight)


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


def untie(g: Graph, linear: fx.Node) -> None:
    """Give a linear layer a weight of its own where it shares one."""
    weight = operands(linear)["weight"]
    if len(weight.users) > 1:
        own = g.new_param(f"{linear.meta['owner']}.weight", g.param(weight).clone())
        linear.replace_input_with(weight, own)
        g.note(f"{own.target} is no longer {weight.target}: {g.param(own).numel()} values more")
