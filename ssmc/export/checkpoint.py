"""A compiled graph as the checkpoint of the transformers model that it was traced from.

Rewrites change weights and leave names: what a graph multiplies with is read off, turned back where
it belongs to something that happens at run time (a rotation, a scale of channels), and put under
the name that the model's own class has for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ssmc.core import Graph
from ssmc.core.graph import is_call
from ssmc.errors import UnsupportedError
from ssmc.export.huggingface import own_config
from ssmc.frontend import huggingface
from ssmc.ops.hadamard import hadamard
from ssmc.quant.formats import unpack
from ssmc.quant.weights import stored_weight
from ssmc.runtime import Artefact

PRODUCTS = ("ssmc::linear", "ssmc::expert_linear")
DEQUANTIZE = ("ssmc::dequantize", "ssmc::dequantize_groups")


@dataclass(frozen=True)
class Stored:
    """The integers of a linear layer's weight, as the graph has them.

    q is int8 [N, K]; scale [N, 1], or [N, K / group]. `bits` are those of the weight, `inputs`
    those of what is multiplied with it: 8 with a scale a token, or 16.
    """

    q: Tensor
    scale: Tensor
    bits: int
    inputs: int

    @property
    def group(self) -> int | None:
        """Columns that share a scale; None for a whole row."""
        groups = self.scale.shape[1]
        return None if groups == 1 else self.q.shape[1] // groups


@dataclass
class Checkpoint:
    """Tensors by the model's own names.

    `tensors` is whole: every name of the model's state, in float32. `stored` has, for the layers
    whose integers a format can take as they are, those as well; `kept` says for each other layer
    that the graph has in integers why it cannot. `config` is the model's config.json, `skeleton`
    the model on the meta device, `tied` are tensors that are others' as well, to be left out.
    """

    config: dict[str, Any]
    skeleton: Any
    tied: set[str] = field(default_factory=set)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    stored: dict[str, Stored] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)


def read_checkpoint(artefact: Artefact) -> Checkpoint:
    """The checkpoint of an artefact.

    Raises UsageError for a model that is not transformers', UnsupportedError where the model has a
    tensor that the graph has nothing for.
    """
    config = own_config(artefact)
    skeleton: Any = huggingface.skeleton(
        huggingface.config(config, artefact.about["source"]["name"])
    )
    found = Checkpoint(dict(config), skeleton)
    _Reader(artefact.graph, found).read()
    return found


def linears(skeleton: Any) -> dict[str, nn.Linear]:
    """The linear layers of a model, by name."""
    return {name: m for name, m in skeleton.named_modules() if isinstance(m, nn.Linear)}


def called_linears(skeleton: Any) -> set[str]:
    """The linear layers that a model, on the meta device, calls; others it reads as tensors.

    The model runs on zeros, for which the system has no memory of their own as long as they are
    only read.
    """
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in linears(skeleton).items()
    ]
    held = [*skeleton.named_parameters(), *skeleton.named_buffers()]
    zeros = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in held}
    given = {"input_ids": torch.zeros((1, 4), dtype=torch.int64), "use_cache": False}
    with torch.no_grad():
        torch.func.functional_call(skeleton, zeros, (), given)
    for hook in hooks:
        hook.remove()
    return called


class _Reader:
    """Fills a checkpoint from a graph and the model it was traced from."""

    def __init__(self, graph: Graph, found: Checkpoint) -> None:
        self.graph, self.found = graph, found
        self.expected: dict[str, Tensor] = found.skeleton.state_dict()
        self.linears = linears(found.skeleton)
        self.called = called_linears(found.skeleton)
        self.values: dict[str, Tensor] = {}

    def read(self) -> None:
        for node in self.graph.nodes:
            if is_call(node, *PRODUCTS):
                self._product(node)
        for name, tensor in self.graph.params().items():
            if not (stored_weight(name) or name.endswith("_scale")):
                self.values.setdefault(name, tensor)
        for node in self.graph.calls("ssmc::dequantize"):
            self._dequantized(node)
        self._tie()
        for name, like in self.expected.items():
            self.found.tensors[name] = self._value(name).reshape(like.shape)

    def _product(self, node: fx.Node) -> None:
        """The weight of a linear layer, with what happens to its input at run time turned back."""
        weight = self._constant(node.args[1])
        name = self._name(node.args[1])
        turned, reason, inputs = _turn_back(self.graph, node.args[0], weight)
        if name in self.values and not torch.equal(self.values[name], turned):
            raise UnsupportedError(f"{name} has two readers that see it rotated differently")
        self.values[name] = turned
        if not is_call(node.args[1], *DEQUANTIZE):
            return
        stored = self._stored(node.args[1], inputs)
        reason = reason or self._unfit(name)
        if stored is not None and reason is None:
            self.found.stored[name] = stored
        else:
            self.found.kept[name] = reason or "its integers are not those of a linear layer"

    def _unfit(self, name: str) -> str | None:
        """Why integers in the place of a weight would not be multiplied with; None: they are."""
        layer = name.removesuffix(".weight")
        if name not in self.expected or layer not in self.linears:
            return "its weight is not that of a linear layer alone"
        if layer not in self.called:
            return "the model reads its weight without calling it"
        return None

    def _dequantized(self, node: fx.Node) -> None:
        """Other tensors that are stored in integers: embeddings, convolutions."""
        if isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr":
            name = self._name(node)
            if name not in self.values:
                self.values[name] = self._constant(node)
                self.found.kept[name] = "the format has integers for linear layers alone"

    def _tie(self) -> None:
        """Tensors that were one and differ now are two in config.json as well."""
        tied = getattr(self.found.skeleton, "_tied_weights_keys", None) or {}
        for other, source in tied.items():
            if other in self.values and not torch.equal(self.values[other], self.values[source]):
                self.found.config["tie_word_embeddings"] = False
            elif source in self.values:
                self.values[other] = self.values[source]
                self.found.tied.add(other)

    def _value(self, name: str) -> Tensor:
        if name in self.values:
            return self.values[name]
        if name.endswith("A_log"):  # the state matrix is A = -exp(A_log) (Mamba, section 3.6)
            a = self.values.get(name.removesuffix("_log"))
            if a is not None:
                return (-a).log()
        if name.endswith("weight") and self.expected[name].dim() == 1:  # of a norm, and folded
            return torch.ones_like(self.expected[name], device="cpu", dtype=torch.float32)
        raise UnsupportedError(
            f"the graph has nothing for the model's tensor '{name}'",
            hint="its passes moved it where the model's own class has no place for it",
        )

    def _stored(self, weight: Any, inputs: int) -> Stored | None:
        """The integers; None where they are not of two dimensions or not evenly spaced."""
        held, scale = (self.graph.param(n) for n in weight.args[:2])
        if held.dim() != 2:
            return None
        if is_call(weight, "ssmc::dequantize"):
            return Stored(held, scale, 8, inputs)
        bits, tanh = weight.args[2], weight.args[3]
        if tanh:
            return None
        columns = held.shape[1] * 8 // bits
        return Stored(unpack(held, bits, columns // scale.shape[1]), scale, bits, inputs)

    def _constant(self, node: Any) -> Tensor:
        """The value of a node that depends on tensors of the graph alone."""
        if node.op == "get_attr":
            return self.graph.param(node)
        if node.op != "call_function":
            raise UnsupportedError(f"the weight '{node.name}' is computed from the input")
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._constant)
        value: Tensor = node.target(*args, **kwargs)
        return value

    def _name(self, node: Any) -> str:
        """The model's name of a tensor: that of what it is computed from, without its format."""
        while node.op != "get_attr":
            node = node.all_input_nodes[0]
        stored = stored_weight(str(node.target))
        return stored[0] if stored else str(node.target)


def _turn_back(graph: Graph, x: Any, weight: Tensor) -> tuple[Tensor, str | None, int]:
    """A weight for the input as it is before it is rotated and scaled, and what those are.

    Returns the weight, the reason for which its integers alone do not do (None: they do), and the
    bits in which the input is multiplied.
    """
    reason, inputs = None, 16
    while True:
        if is_call(x, "ssmc::hadamard"):
            weight = _rotated(weight, int(x.args[1]))
            reason = "its input is rotated at run time"
            x = x.args[0]
        elif is_call(x, "ssmc::dequantize"):
            q, used = x.args[:2]
            if is_call(q, "getitem"):  # a scale a token
                inputs, x = 8, q.args[0].args[0]
                continue
            was = graph.param(q.args[1])
            weight = weight * (graph.param(used) / was)
            reason = "its input has static scales, one a channel"
            x = q.args[0]
        elif is_call(x, "to_dtype"):
            x = x.args[0]
        else:
            return weight, reason, inputs


def _rotated(weight: Tensor, block: int) -> Tensor:
    """W H for W [..., K] and H the rotation of runs of `block` inputs."""
    matrix = hadamard(torch.eye(block), block).T  # hadamard gives H x for each row x
    return (weight.unflatten(-1, (-1, block)) @ matrix).flatten(-2)
