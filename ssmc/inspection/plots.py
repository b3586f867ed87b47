"""The plots of a story, needs matplotlib: ranges of channels, outliers, errors and sizes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ssmc.errors import UsageError
from ssmc.inspection.sizes import by_role
from ssmc.inspection.story import Story
from ssmc.pyplot import load_pyplot

SIZE = (3.5, 2.6)
"""Inches: 336 pixels of a page, which a phone shows as they are."""
BEFORE, AFTER = "#b45309", "#1d4ed8"
_STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
    "svg.fonttype": "path", "svg.hashsalt": "ssmc",
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """A plot: the name of its file, what it shows in words, and the figure."""

    name: str
    text: str
    figure: Any


def plots(story: Story, layer: int) -> Iterator[Plot]:
    """Every plot of a layer and of the whole model; what was not measured is left out."""
    pyplot = load_pyplot()
    with pyplot.rc_context(_STYLE):
        for name, before in story.before.get(layer, {}).items():
            after = story.after.get(layer, {}).get(name)
            if after is not None:
                yield _ranges(pyplot, layer, name, before, after)
        for name in _common(story):
            yield _outliers(pyplot, story, name)
        if story.report.get("numerics"):
            yield _errors(pyplot, story)
        yield _sizes(pyplot, story)


def save(story: Story, layer: int, folder: Path) -> list[Path]:
    """Write every plot as a PNG into a folder, made where it is missing; the files.

    Raises UsageError where matplotlib is missing or the folder cannot be written.
    """
    made = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for plot in plots(story, layer):
            out = folder / f"{plot.name}.png"
            plot.figure.savefig(out, dpi=200)
            load_pyplot().close(plot.figure)
            made.append(out)
    except OSError as error:
        raise UsageError(
            f"cannot write {folder}: {error.strerror}", hint="name another folder"
        ) from None
    return made


def svg(plot: Plot) -> str:
    """A plot as SVG, closed afterwards."""
    out = io.StringIO()
    plot.figure.savefig(out, format="svg", metadata={"Date": None})
    load_pyplot().close(plot.figure)
    return out.getvalue()


def outlier_ratio(channels: Tensor) -> float:
    """The largest channel's range by the median channel's."""
    return float(channels.max() / channels.median().clamp_min(1e-12))


def _figure(pyplot: Any, title: str) -> tuple[Any, Any]:
    figure, axis = pyplot.subplots(figsize=SIZE, layout="constrained")
    axis.set_title(title)
    return figure, axis


def _legend(figure: Any) -> None:
    """Under the axes, where it hides nothing."""
    figure.legend(loc="outside lower center", ncols=2, frameon=False)


def _ranges(pyplot: Any, layer: int, name: str, before: Tensor, after: Tensor) -> Plot:
    """Both ranges of each channel, on the same axes."""
    figure, axis = _figure(pyplot, f"{name}, layer {layer}")
    axis.fill_between(range(len(before)), before.tolist(), color=BEFORE, alpha=0.35, linewidth=0)
    axis.plot(before.tolist(), color=BEFORE, linewidth=0.8, label="before")
    axis.plot(after.tolist(), color=AFTER, linewidth=0.8, linestyle="--", label="after")
    axis.set_xlabel("channel")
    axis.set_ylabel("largest |x|")
    axis.set_ylim(bottom=0)
    _legend(figure)
    text = (
        f"{name} of layer {layer}, {len(before)} channels: largest {before.max():.3g} before "
        f"the rewrites and {after.max():.3g} after, {outlier_ratio(before):.1f} and "
        f"{outlier_ratio(after):.1f} times the median channel's"
    )
    return Plot(f"ranges-layer-{layer}-{name.replace(' ', '-')}", text, figure)


def _common(story: Story) -> list[str]:
    """Values that more than one layer has, before and after."""
    layers = [layer for layer in story.before if layer in story.after]
    names = [n for layer in layers for n in story.before[layer] if n in story.after[layer]]
    return [n for n in dict.fromkeys(names) if names.count(n) > 1]


def _outliers(pyplot: Any, story: Story, name: str) -> Plot:
    """How far the largest channel stands out in every layer."""
    figure, axis = _figure(pyplot, f"{name}: largest channel / median")
    layers = [n for n, found in story.before.items() if name in found and name in story.after[n]]
    before = [outlier_ratio(story.before[n][name]) for n in layers]
    after = [outlier_ratio(story.after[n][name]) for n in layers]
    axis.plot(layers, before, "o-", color=BEFORE, markersize=4, label="before")
    axis.plot(layers, after, "s--", color=AFTER, markersize=4, label="after")
    axis.set_ylim(bottom=1)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("layer")
    _legend(figure)
    text = (
        f"the largest channel of {name} by the median one, over {len(layers)} layers: at most "
        f"{max(before):.1f} before and {max(after):.1f} after the rewrites"
    )
    return Plot(f"outliers-{name.replace(' ', '-')}", text, figure)


def _errors(pyplot: Any, story: Story) -> Plot:
    """Signal-to-noise behind each block."""
    figure, axis = _figure(pyplot, "signal-to-noise behind each block")
    rows = sorted(story.report["numerics"], key=lambda row: row["block"])
    axis.bar([r["block"] for r in rows], [r["output"] for r in rows], color=AFTER)
    axis.set_xlabel("block")
    axis.set_ylabel("dB")
    worst = min(rows, key=lambda row: row["output"])
    text = f"signal-to-noise of every block's output; worst is block {worst['block']} with "
    return Plot("errors", f"{text}{worst['output']:.1f} dB", figure)


def _sizes(pyplot: Any, story: Story) -> Plot:
    """Bytes of the tensors, by role and width."""
    figure, axis = _figure(pyplot, "megabytes")
    rows = by_role(story.moment)
    axis.barh([r.role for r in rows], [r.bytes / 1e6 for r in rows], color=AFTER)
    axis.invert_yaxis()
    axis.set_xlabel("MB")
    total = sum(r.bytes for r in rows)
    text = f"bytes of the tensors by what they belong to, {total / 1e6:.2f} MB together"
    return Plot("sizes", text, figure)


def check_plots() -> None:
    """Raise UsageError where matplotlib is missing."""
    load_pyplot()
