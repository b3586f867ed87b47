"""A layer as lines beside its calls: one row a call, and a rail for each value that goes further.

Calls stand below one another in execution order. What the next call reads is a line to it; a value
that others read as well runs down on a rail of its own, with a branch into each of them. Nothing
crosses a label, however many calls there are, and a terminal draws it as well as a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from ssmc.inspection.moments import Call


class Part(Enum):
    """What a rail does in a row: begin behind its call, pass, branch into one, or end in it."""

    NONE = 0
    BEGIN = 1
    PASS = 2
    BRANCH = 3
    END = 4


@dataclass
class Row:
    """A call, or a value from outside the layer; its rails, the nearest first; what is above.

    `above` and `below` say whether a line comes straight from the row above, and goes to the next.
    """

    name: str
    call: Call | None
    rails: list[Part] = field(default_factory=list)
    above: bool = False
    below: bool = False


def rows(calls: Sequence[Call], states: Sequence[str] = ()) -> list[Row]:
    """The rows of the calls of a layer, with those of what they read from outside in front.

    `states` are the names of states and inputs, which are named in the calls that read them.
    """
    inside = {call.name for call in calls}
    read = dict.fromkeys(n for call in calls for n in call.inputs if n not in inside)
    outside = [name for name in read if name not in states]
    found = [Row(name, None) for name in outside] + [Row(call.name, call) for call in calls]
    place = {row.name: i for i, row in enumerate(found)}
    readers: dict[str, list[int]] = {}
    for call in calls:
        for name in call.inputs:
            if name in place:
                readers.setdefault(name, []).append(place[call.name])
    free: list[int] = []  # the row up to which each rail is taken
    for row, name in enumerate(place):
        _draw(found, row, sorted(set(readers.get(name, []))), free)
    return found


def _draw(found: list[Row], row: int, readers: list[int], free: list[int]) -> None:
    """The line or the rail of what a row puts out."""
    if not readers:
        return
    if readers == [row + 1]:
        found[row].below = found[row + 1].above = True
        return
    rail = next((i for i, until in enumerate(free) if until < row), len(free))
    if rail == len(free):
        free.append(0)
    free[rail] = readers[-1]
    _set(found[row], rail, Part.BEGIN)
    for i in range(row + 1, readers[-1]):
        _set(found[i], rail, Part.BRANCH if i in readers else Part.PASS)
    _set(found[readers[-1]], rail, Part.END)


def _set(row: Row, rail: int, part: Part) -> None:
    row.rails += [Part.NONE] * (rail + 1 - len(row.rails))
    row.rails[rail] = part
