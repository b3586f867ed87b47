"""Parameters that several calls read, and calls that get one of their own."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from torch import fx

from ssmc.core import Graph
from ssmc.core.dialect import operands


def part(g: Graph, kinds: Mapping[fx.Node, Hashable], name: str = "weight") -> None:
    """Leave a parameter shared by calls of one kind only: those of another get a copy.

    `kinds` says of calls what is to become of their operand `name`; calls that it does not have
    keep theirs as it is. The copies are in the notes.
    """
    for param in dict.fromkeys(operands(call).get(name) for call in kinds):
        if param is None:
            continue
        groups: dict[Hashable, list[fx.Node]] = {}
        for user in param.users:
            groups.setdefault(kinds.get(user), []).append(user)
        stays = None if None in groups else next(iter(groups))
        for kind, calls in groups.items():
            if kind != stays:
                _copy(g, param, calls)


def _copy(g: Graph, param: fx.Node, calls: list[fx.Node]) -> None:
    leaf = str(param.target).rpartition(".")[2]
    value = g.param(param)
    own = g.new_param(f"{calls[0].meta['owner']}.{leaf}", value.clone())
    for call in calls:
        call.replace_input_with(param, own)
    g.note(
        f"{own.target} is no longer {param.target}: "
        f"{value.numel()} values more, {value.nbytes} bytes before they are quantised"
    )
