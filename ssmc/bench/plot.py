"""What was measured, as a plot: latency against length and against batch, needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from ssmc.bench.measure import Measurement, Workload
from ssmc.bench.report import Report, device_name
from ssmc.errors import UsageError
from ssmc.pyplot import load_pyplot

TITLES = {
    "ttft": "time to the first token",
    "tpot": "time per token",
    "ttlt": "time to the last token",
}
LINES = ("-", "--", ":", "-.")


def check_plot(out: Path) -> None:
    """Raise UsageError where no plot can be written to `out`."""
    load_pyplot()
    if not out.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {out.absolute().parent}", hint="make it first")


def plot(report: Report, out: Path) -> None:
    """Write the figure of a report; UsageError where that cannot be."""
    pyplot = load_pyplot()
    made = figure(report)
    try:
        made.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write {out}: {error}", hint="name a .png file") from None
    finally:
        pyplot.close(made)


def figure(report: Report) -> Any:
    """A panel for each kind and for what varies in it, the tokens or the batch; else bars.

    Lines are medians, the bands around them reach from the 10th to the 90th percentile. A subject
    has one colour in all panels.
    """
    panels = [panel for kind in TITLES for panel in _panels(report, kind)]
    made, axes = load_pyplot().subplots(
        1, len(panels), figsize=(5 * len(panels), 5), squeeze=False, layout="constrained"
    )
    for axis, draw in zip(axes[0], panels, strict=True):
        draw(axis)
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    axes[0][0].set_ylabel("ms")
    made.suptitle(device_name(report.device))
    return made


def _panels(report: Report, kind: str) -> list[Callable[[Any], None]]:
    """What draws each panel of a kind; none where nothing of it was measured."""
    found = [m for m in report.result.measurements if m.workload.kind == kind]
    lengths = {_length(m.workload) for m in found}
    batches = {m.workload.batch for m in found}
    panels: list[Callable[[Any], None]] = []
    if len(lengths) > 1:
        panels.append(lambda axis: _lines(axis, report, found, "tokens", _length, _batch))
    if len(batches) > 1:
        panels.append(lambda axis: _lines(axis, report, found, "sequences", _batch, _length))
    if found and not panels:
        panels.append(lambda axis: _bars(axis, report, found))
    return panels


def _length(workload: Workload) -> int:
    return workload.prompt + (workload.tokens if workload.kind == "ttlt" else 0)


def _batch(workload: Workload) -> int:
    return workload.batch


def _lines(
    axis: Any,
    report: Report,
    found: Sequence[Measurement],
    unit: str,
    place: Callable[[Workload], int],
    other: Callable[[Workload], int],
) -> None:
    """Latency by `place`, a line for each subject and each value of `other`."""
    from matplotlib import ticker

    others = sorted({other(m.workload) for m in found})
    for i, subject in enumerate(report.subjects):
        for value, style in zip(others, cycle(LINES), strict=False):
            mine = [m for m in found if (m.target, other(m.workload)) == (subject.name, value)]
            mine.sort(key=lambda m: place(m.workload))
            x = [place(m.workload) for m in mine]
            name = subject.name if len(others) == 1 else f"{subject.name}, {_said(unit, value)}"
            axis.plot(x, [m.timing.median_ms for m in mine], style, color=f"C{i}", marker=".",
                      label=name)  # fmt: skip
            low, high = ([getattr(m.timing, f"p{p}_ms") for m in mine] for p in (10, 90))
            axis.fill_between(x, low, high, color=f"C{i}", alpha=0.2, linewidth=0)
    ticks = sorted({place(m.workload) for m in found})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set_xlabel(unit)
    axis.set_title(TITLES[found[0].workload.kind])


def _said(unit: str, other: int) -> str:
    return f"batch {other}" if unit == "tokens" else f"{other} tokens"


def _bars(axis: Any, report: Report, found: Sequence[Measurement]) -> None:
    """One workload: a bar for each subject."""
    for i, subject in enumerate(report.subjects):
        for m in (m for m in found if m.target == subject.name):
            t = m.timing
            error = [[t.median_ms - t.p10_ms], [t.p90_ms - t.median_ms]]
            axis.bar([i], [t.median_ms], yerr=error, color=f"C{i}", capsize=2, label=subject.name)
    workload = found[0].workload
    axis.set_xticks([])
    axis.set_xlabel(f"{_length(workload)} tokens, batch {workload.batch}")
    axis.set_title(TITLES[workload.kind])
