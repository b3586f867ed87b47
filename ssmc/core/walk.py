"""Running a graph call by call, with little in memory beside what calls to come read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

Seen = Callable[[fx.Node, Any], None]
Leaf = Callable[[fx.Node], Any]
"""What no call computes: an input, a state, a parameter."""


def walk(nodes: Iterable[fx.Node], wanted: Any, leaf: Leaf, seen: Seen) -> Any:
    """The value of `wanted`, a node or nodes in tuples, from all calls among `nodes` in order.

    `leaf` is asked when a call first reads what it gives. `seen` is shown every value.
    """
    calls = [node for node in nodes if node.op == "call_function"]
    kept: set[fx.Node] = set()
    fx.map_arg(wanted, kept.add)
    read = ((operand, call) for call in calls for operand in call.all_input_nodes)
    last = {operand: call for operand, call in read if operand not in kept}
    values: dict[fx.Node, Any] = {}

    def value(node: fx.Node) -> Any:
        if node not in values:
            values[node] = leaf(node)
            seen(node, values[node])
        return values[node]

    for call in calls:
        found = _result(call, value)
        for operand in call.all_input_nodes:
            if last.get(operand) is call:
                del values[operand]
        seen(call, found)
        if call in kept or call in last:
            values[call] = found
    return fx.map_arg(wanted, value)


def _result(call: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
    args, kwargs = fx.map_arg((call.args, call.kwargs), value)
    with torch.no_grad():
        return call.target(*args, **kwargs)  # type: ignore[operator]
