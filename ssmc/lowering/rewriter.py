"""Rules over a graph: what a rule is, and how its result takes the place of what it matched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import fx

from ssmc.core import Graph, Match, is_call
from ssmc.core.pattern import Pattern

VIEWS = ("getitem", "split", "flatten", "unflatten")
"""Calls that only pick or reshape what another call computed."""

Rewrite = Callable[[Graph, Match], Mapping[fx.Node, fx.Node] | fx.Node | None]
"""From a match to the calls in its place: for each value that is computed anew the node that holds
it, or one node for the value of the match itself. None where the rule does not hold after all."""

Rule = tuple[Pattern, Rewrite]
Rules = Sequence[Rule]


class Rewriter:
    """Applies rules to a graph, a list of them after the other.

    A new node takes the name and role of the value it stands for, so that every value keeps the
    name it has in the simulation. `fused` are the calls that rules have put in.
    """

    def __init__(self, g: Graph) -> None:
        self.g = g
        self.fused: dict[fx.Node, None] = {}
        self._gone: set[fx.Node] = set()
        _parameters_first(g)

    def apply(self, rules: Rules) -> None:
        """Try the rules, in order, at every call; the first that gives something ends the trial."""
        for node in self.g.nodes:
            if node not in self._gone and node.op == "call_function":
                self._apply_first(node, rules)

    def _apply_first(self, node: fx.Node, rules: Rules) -> None:
        for pattern, rewrite in rules:
            match = pattern.match(node)
            if match is None:
                continue
            with self.g.before(node):
                made = rewrite(self.g, match)
            if made is not None:
                self._put(made if isinstance(made, Mapping) else {node: made})
                return

    def _put(self, values: Mapping[fx.Node, fx.Node]) -> None:
        for old, new in values.items():
            new.meta["role"] = old.meta.get("role")
            self.fused[call_behind(new)] = None
            old.replace_all_uses_with(new)
        for old in values:
            self._drop(old)
        for old, new in values.items():
            new.name = old.name

    def _drop(self, node: fx.Node) -> None:
        """Erase `node` if nothing uses it, and then what only it used."""
        if node in self._gone or node.users or node.op != "call_function":
            return
        self._gone.add(node)
        self.fused.pop(node, None)
        operands = node.all_input_nodes
        self.g.module.graph.erase_node(node)
        for operand in operands:
            self._drop(operand)


def _parameters_first(g: Graph) -> None:
    """Move parameters to the front, where every call can use them."""
    first = next(n for n in g.nodes if n.op in ("call_function", "output"))
    for node in g.nodes:
        if node.op == "get_attr":
            first.prepend(node)


def call_behind(node: fx.Node) -> fx.Node:
    """The call that computed `node`, behind the views on its results."""
    while is_call(node, *VIEWS):
        node = node.args[0]  # type: ignore[assignment]
    return node
