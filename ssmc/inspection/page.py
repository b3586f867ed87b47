"""A story as one HTML page that needs nothing else: no network, no scripts, no other file."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

import ssmc
from ssmc.errors import UsageError
from ssmc.inspection.labels import Label, label
from ssmc.inspection.moments import CHANGED, GONE, KEPT, NEW, Call, Moment
from ssmc.inspection.plots import check_plots, plots, svg
from ssmc.inspection.rails import Part, Row, rows
from ssmc.inspection.sizes import by_role, sizes
from ssmc.inspection.story import Step, Story

WORDS = {NEW: "new", CHANGED: "changed", GONE: "goes", KEPT: ""}
STEP = 12
"""Pixels between rails."""
TOP = 13
"""Pixels from the top of a row to the line into its call."""


@dataclass(frozen=True)
class RowView:
    """A row of a drawing: SVG of its rails, the label, how it stands to the other moment."""

    rails: str
    label: Label
    mark: str
    word: str
    tensors: tuple[str, ...]
    outside: bool


@dataclass(frozen=True)
class PassView:
    """A pass on the page: its record, what it matched in the layer, what it skipped by reason.

    Both drawings where it changed the layer; `told` says whether its graphs are known at all.
    """

    record: dict[str, Any]
    matched: list[str]
    skipped: list[tuple[str, list[str]]]
    told: bool
    before: list[RowView]
    after: list[RowView]


def check_page(out: Path) -> None:
    """Raise UsageError where no page can be written to `out`, before there is one."""
    check_plots()
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UsageError(
            f"cannot write {out}: it is a folder, or in none", hint="name a file: report.html"
        )


def write(story: Story, layer: int, out: Path) -> None:
    """Write the page to a file, whole or not at all.

    Raises UsageError where matplotlib is missing or the file cannot be written.
    """
    text = render(story, layer)
    part = out.with_name(f".{out.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(out)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UsageError(
            f"cannot write {out}: {error.strerror}", hint="name a file in a folder that is there"
        ) from None


def render(story: Story, layer: int) -> str:
    """The page of a story with the drawings of one layer."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ssmc.inspection", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        story=story,
        layer=layer,
        tools=(story.about.get("tools") or {}).get("ssmc", ssmc.__version__),
        passes=_passes(story, layer),
        result=_drawing(story.moment, layer),
        plots=[(plot.name, plot.text, _data(svg(plot))) for plot in plots(story, layer)],
        numerics=_numerics(story.report.get("numerics") or []),
        operators=(story.report.get("operators") or [])[:20],
        sizes=sizes(story.moment),
        roles=by_role(story.moment),
        recipe=json.dumps(story.about.get("recipe"), indent=2),
        metrics=story.about.get("metrics") or {},
    )


def _data(text: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode()}"


def _numerics(found: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    columns = ["block", *dict.fromkeys(k for row in found for k in row if k != "block")]
    cells = [[_decibels(row.get(c)) for c in columns] for row in found]
    return columns, cells


def _decibels(value: float | int | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.1f}"


def _passes(story: Story, layer: int) -> list[PassView]:
    """With their graphs where a compilation was heard, without them of an artefact alone."""
    if story.steps:
        return [
            _pass(step.record, layer, [step.before, step.after], _changes(step, layer))
            for step in story.steps
        ]
    return [_pass(record, layer, [story.moment], None) for record in story.records]


def _pass(
    record: dict[str, Any],
    layer: int,
    moments: Sequence[Moment],
    changes: tuple[list[RowView], list[RowView]] | None,
) -> PassView:
    inside = {name for m in moments for call in m.layer(layer) for name in call.members}
    reasons: dict[str, list[str]] = {}
    for skip in record["skipped"]:
        reasons.setdefault(skip["reason"], []).append(skip["node"])
    matched = [name for name in record["matched"] if name in inside]
    before, after = changes or ([], [])
    return PassView(record, matched, list(reasons.items()), changes is not None, before, after)


def _changes(step: Step, layer: int) -> tuple[list[RowView], list[RowView]]:
    """The layer before and after a pass; nothing of a layer that it left as it was."""
    old, new = step.before.marks(step.after, GONE), step.after.marks(step.before, NEW)
    changed = any(new[call.name] != KEPT for call in step.after.layer(layer)) or any(
        old[call.name] != KEPT for call in step.before.layer(layer)
    )
    if not changed:
        return [], []
    return (
        _drawing(step.before, layer, old, step.after),
        _drawing(step.after, layer, new, step.before),
    )


def _drawing(
    moment: Moment,
    layer: int,
    marks: dict[str, str] | None = None,
    other: Moment | None = None,
) -> list[RowView]:
    found = rows(moment.layer(layer), moment.inputs)
    width = max((len(row.rails) for row in found), default=0)
    return [_row(row, moment, width, marks or {}, other) for row in found]


def _row(
    row: Row, moment: Moment, width: int, marks: dict[str, str], other: Moment | None
) -> RowView:
    if row.call is None:
        shown = Label(f"from {row.name}", ())
        return RowView(_rails(row, width), shown, "", "", (), outside=True)
    mark = marks.get(row.name, KEPT)
    tensors = _changed(row.call, moment, other)
    return RowView(
        _rails(row, width), label(row.call, moment), mark, WORDS[mark], tensors, outside=False
    )


def _changed(call: Call, moment: Moment, other: Moment | None) -> tuple[str, ...]:
    if other is None:
        return ()
    return tuple(".".join(name.split(".")[-2:]) for name in moment.changed(call, other))


def _rails(row: Row, width: int) -> str:
    """The lines of a row: as high as it becomes, which percentages follow."""
    node = STEP * (width + 0.5)
    lines = []
    if row.above:
        lines.append(_line(node, "0", node, str(TOP)))
    if row.below:
        lines.append(_line(node, str(TOP), node, "100%"))
    for i, part in enumerate(row.rails):
        x = STEP * (width - i - 0.5)
        lines += [_line(x, a, x, b) for a, b in _vertical(part)]
        if part in (Part.BEGIN, Part.BRANCH, Part.END):
            lines.append(_line(x, str(TOP), node, str(TOP)))
        if part is Part.BRANCH:  # told from a line that only crosses
            lines.append(f'<circle cx="{x}" cy="{TOP}" r="2.5"/>')
    dot = f'<circle cx="{node}" cy="{TOP}" r="4"/>'
    size = STEP * (width + 1)
    drawn = f'<svg width="{size}" aria-hidden="true">{"".join(lines)}{dot}</svg>'
    return f'<span class="rails" style="width:{size}px">{drawn}</span>'


def _vertical(part: Part) -> Sequence[tuple[str, str]]:
    if part is Part.BEGIN:
        return [(str(TOP), "100%")]
    if part is Part.END:
        return [("0", str(TOP))]
    return [] if part is Part.NONE else [("0", "100%")]


def _line(x1: float, y1: str, x2: float, y2: str) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'
