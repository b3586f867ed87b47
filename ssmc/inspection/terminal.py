"""A layer as a graph in a terminal: rails drawn with box characters, labels wrapped beside them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from ssmc.inspection.labels import label
from ssmc.inspection.moments import Moment
from ssmc.inspection.rails import Part, Row, rows

_CORNER = {Part.BEGIN: "╭", Part.BRANCH: "├", Part.END: "╰"}
_CROSSED = {Part.BEGIN: "┬", Part.BRANCH: "┿", Part.END: "┴", Part.PASS: "┼"}
"""With a line through them from a rail further off."""
NARROWEST = 30  # columns of text beside many rails


def draw(
    moment: Moment, layer: int, width: int = 100, marks: Mapping[str, str] | None = None
) -> list[str]:
    """The lines of a layer's graph, at most `width` columns each.

    A call has a line of its own, and more where its label is long. `marks` stand in front of it.
    """
    found = rows(moment.layer(layer), moment.inputs)
    rails = max((len(row.rails) for row in found), default=0)
    lines = []
    for row in found:
        mark = "  " if marks is None else f"{marks.get(row.name, ' ')} "
        lines += _row(row, moment, rails, width, mark)
    return lines


def _row(row: Row, moment: Moment, rails: int, width: int, mark: str) -> list[str]:
    room = max(width - len(mark) - 2 * rails - 3, NARROWEST)
    if row.call is None:
        text = [f"from %{row.name}"]
    else:
        found = label(row.call, moment)
        text = _wrap((found.title, *found.details), room)
    node = "◦" if row.call is None else "●"
    first = f"{mark}{_rails(row.rails, rails)}{node} {text[0]}"
    under = " " * len(mark) + _under(row, rails)
    return [first, *(f"{under} {line}" for line in text[1:])]


def _wrap(texts: Sequence[str], room: int) -> list[str]:
    """Texts beside one another, in lines that break between two of them where they can."""
    lines = [""]
    for text in texts:
        joined = f"{lines[-1]}   {text}" if lines[-1] else text
        if len(joined) <= room:
            lines[-1] = joined
        else:
            lines += textwrap.wrap(text, room, initial_indent="  ", subsequent_indent="    ")
    return [line for line in lines if line]


def _rails(parts: Sequence[Part], count: int) -> str:
    """The rails of a row, the furthest first, with the lines between them and the call."""
    cells, reached = [], False
    for i in reversed(range(count)):
        part = parts[i] if i < len(parts) else Part.NONE
        if reached:
            cells.append(_CROSSED.get(part, "─") + "─")
        elif part in _CORNER:
            cells.append(_CORNER[part] + "─")
            reached = True
        else:
            cells.append("│ " if part is Part.PASS else "  ")
    return "".join(cells)


def _under(row: Row, count: int) -> str:
    """The rails beside the further lines of a label."""
    cells = []
    for i in reversed(range(count)):
        part = row.rails[i] if i < len(row.rails) else Part.NONE
        cells.append("│ " if part in (Part.BEGIN, Part.PASS, Part.BRANCH) else "  ")
    return "".join(cells) + ("│" if row.below else " ")
