"""A graph as it was at a moment: its calls as plain data, to be drawn and compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ssmc.core import Graph
from ssmc.core.dialect import operands, target_name
from ssmc.core.graph import is_call
from ssmc.core.text import node_line, value_text

KEPT, NEW, CHANGED, GONE = " ", "+", "~", "-"
"""How a call stands to the moment before or after: as it is, new, another, gone."""


@dataclass(frozen=True)
class Call:
    """A call of the graph, with what only serves it folded in.

    `inputs` are names of calls; `tensors` the names of parameters; `members` the nodes it stands
    for, the first of which has its name.
    """

    name: str
    operator: str
    layer: int | None
    role: str
    value: str
    options: str
    inputs: tuple[str, ...]
    tensors: tuple[str, ...]
    members: tuple[str, ...]


@dataclass(frozen=True)
class Moment:
    """Calls by name in execution order, the line of every node, and the tensors.

    Tensors are never changed in place, so they are not copied, and another one is a change.
    """

    calls: dict[str, Call]
    lines: dict[str, str]
    tensors: dict[str, torch.Tensor]
    inputs: tuple[str, ...] = ()

    @classmethod
    def of(cls, g: Graph) -> Moment:
        """The present of `g`."""
        return cls(
            _calls(g),
            {n.name: node_line(n) for n in g.nodes if n.op == "call_function"},
            g.params(),
            tuple(n.name for n in g.nodes if n.op == "placeholder"),
        )

    def layer(self, layer: int) -> list[Call]:
        """The calls of a layer, in execution order."""
        return [call for call in self.calls.values() if call.layer == layer]

    def layers(self) -> list[int]:
        """The numbers of the layers."""
        return sorted({c.layer for c in self.calls.values() if c.layer is not None})

    def marks(self, other: Moment, missing: str) -> dict[str, str]:
        """How each call stands to another moment: KEPT, CHANGED, or where it lacks it `missing`."""
        return {name: self._mark(call, other, missing) for name, call in self.calls.items()}

    def _mark(self, call: Call, other: Moment, missing: str) -> str:
        if call.name not in other.calls:
            return missing
        same = all(self.lines[m] == other.lines.get(m) for m in call.members)
        return KEPT if same and not self.changed(call, other) else CHANGED

    def changed(self, call: Call, other: Moment) -> list[str]:
        """The tensors of a call that are not the same at another moment."""
        return [n for n in call.tensors if self.tensors[n] is not other.tensors.get(n)]


@dataclass
class _Folding:
    """Which call stands for a node, and what it has taken in."""

    owner: dict[fx.Node, fx.Node] = field(default_factory=dict)
    members: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)

    def give(self, node: fx.Node, to: fx.Node) -> None:
        owner = self.owner.get(to, to)
        self.owner[node] = owner
        self.members.setdefault(owner, []).append(node)


def _calls(g: Graph) -> dict[str, Call]:
    folding, constants = _Folding(), _constants(g)
    shown = [n for n in g.nodes if n.op == "call_function" and n not in constants]
    for node in shown:
        source = _folds_into(node)
        if source is not None:
            folding.give(node, source)
        else:
            folding.members.setdefault(node, [])
    return {
        node.name: _call(node, folding, constants) for node in shown if node not in folding.owner
    }


def _constants(g: Graph) -> set[fx.Node]:
    """The calls that depend on parameters alone: weights on their way out of their format."""
    found: set[fx.Node] = set()
    for node in g.nodes:
        read = node.all_input_nodes if node.op == "call_function" else []
        if read and all(n.op == "get_attr" or n in found for n in read):
            found.add(node)
    return found


def _folds_into(node: fx.Node) -> fx.Node | None:
    """The call that shows a node as well: of results the call, of dequantize its quantize."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or first.op != "call_function":
        return None
    if is_call(node, "getitem"):
        return first
    if is_call(node, "ssmc::dequantize") and is_call(first, "ssmc::quantize", "getitem"):
        return first
    return first if is_call(node, "to_dtype") and is_call(first, "to_dtype") else None


def _call(node: fx.Node, folding: _Folding, constants: set[fx.Node]) -> Call:
    members = folding.members[node]
    inside = {node, *members}
    read = [n for m in (node, *members) for n in m.all_input_nodes if n not in inside]
    weights = [n for n in read if n in constants]
    tensors = [n for n in (*read, *_sources(weights, constants)) if n.op == "get_attr"]
    inputs = [folding.owner.get(n, n) for n in read if n.op != "get_attr" and n not in constants]
    return Call(
        name=node.name,
        operator=target_name(node.target).removeprefix("ssmc::"),
        layer=node.meta.get("layer"),
        role=str(node.meta.get("role") or ""),
        value=value_text(_last_value(node, members)),
        options=_options(node),
        inputs=tuple(dict.fromkeys(n.name for n in inputs)),
        tensors=tuple(dict.fromkeys(str(n.target) for n in tensors)),
        members=(node.name, *(m.name for m in members), *(w.name for w in weights)),
    )


def _sources(weights: Iterable[fx.Node], constants: set[fx.Node]) -> list[fx.Node]:
    """What constants are computed from."""
    found: list[fx.Node] = []
    for node in weights:
        for n in node.all_input_nodes:
            found += _sources([n], constants) if n in constants else [n]
    return found


def _last_value(node: fx.Node, members: list[fx.Node]) -> Any:
    last = [m for m in members if is_call(m, "ssmc::dequantize", "to_dtype")]
    return (last[-1] if last else node).meta.get("val")


def _options(node: fx.Node) -> str:
    """What a call of ours is given besides tensors, where that is a choice: `block=512`."""
    if not target_name(node.target).startswith("ssmc::"):
        return ""
    given = {k: v for k, v in operands(node).items() if isinstance(v, int | float | str)}
    return ", ".join(f"{k}={v}" for k, v in given.items() if not isinstance(v, bool))
