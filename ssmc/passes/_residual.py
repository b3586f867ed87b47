"""The residual stream: the sum that blocks read through norms and write through projections."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from ssmc.core import Graph, is_call
from ssmc.core.dialect import operands
from ssmc.errors import PassError
from ssmc.passes._transformer import LINEARS
from ssmc.passes.fold_norm import fold_norm

_HINT = "leave residual=true out for this model"


@dataclass
class ResidualStream:
    """The embedding, the weights (get_attr nodes) that read the stream and those that write it."""

    embedding: fx.Node
    values: set[fx.Node]
    readers: list[fx.Node] = field(default_factory=list)
    writers: list[fx.Node] = field(default_factory=list)
    biases: list[fx.Node] = field(default_factory=list)

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
        return stream

    def _carries(self, node: fx.Node) -> bool:
        return is_call(node, "add", "to_dtype") and any(
            a in self.values for a in node.all_input_nodes
        )

    def _meet(self, g: Graph, value: fx.Node, user: fx.Node) -> None:
        if user in self.values:
            self._write(user)
        elif is_call(user, "ssmc::rms_norm"):
            self._read(g, user)
        else:
            raise PassError(f"{user.name} reads the residual stream without a norm", hint=_HINT)

    def _write(self, node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            if operand in self.values:
                continue
            writer = _layer_behind(operand)
            if writer is None:
                raise PassError(f"{operand.name}, no linear layer, writes the residual", hint=_HINT)
            args = operands(writer)
            self._note(self.writers, args["weight"])
            if args.get("bias") is not None:
                self._note(self.biases, args["bias"])

    def _read(self, g: Graph, norm: fx.Node) -> None:
        for user in list(norm.users):
            if not is_call(user, *LINEARS):
                raise PassError(f"{user.name}, no linear layer, reads {norm.name}", hint=_HINT)
            untie(g, user)
        if operands(norm)["weight"] is not None:
            folded = fold_norm(g, norm)
            g.replace(norm, folded)
            norm = folded
        for user in norm.users:
            self._note(self.readers, operands(user)["weight"])

    @staticmethod
    def _note(weights: list[fx.Node], weight: fx.Node) -> None:
        if weight not in weights:
            weights.append(weight)


def _layer_behind(value: fx.Node) -> fx.Node | None:
    """The linear layer that gives `value`, or whose experts' outputs it is the weighted sum of."""
    if is_call(value, "ssmc::linear"):
        return value
    product = value.args[0] if is_call(value, "sum") and value.args[1] == 2 else None
    if not is_call(product, "mul"):
        return None
    weighted = [n for n in product.all_input_nodes if is_call(n, "ssmc::expert_linear")]  # type: ignore[union-attr]
    per_expert = [n for n in product.all_input_nodes if n.meta["val"].shape[-1] == 1]  # type: ignore[union-attr]
    return weighted[0] if len(weighted) == len(per_expert) == 1 else None


def untie(g: Graph, linear: fx.Node) -> None:
    """Give a linear layer a weight of its own where it shares one."""
    weight = operands(linear)["weight"]
    if len(weight.users) > 1:
        own = g.new_param(f"{linear.meta['owner']}.weight", g.param(weight).clone())
        linear.replace_input_with(weight, own)
        g.note(f"{own.target} is no longer {weight.target}: {g.param(own).numel()} values more")
