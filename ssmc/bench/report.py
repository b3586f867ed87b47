"""What was measured, as data, as the rows of a table, and as a plot."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ssmc
from ssmc.bench.measure import Measurement, Plan, Result, Workload
from ssmc.bench.subjects import Subject
from ssmc.errors import UsageError

PACKAGES = ("torch", "triton", "transformers", "mamba-ssm", "causal-conv1d")
LABELS = {"ttft": "first token", "tpot": "a token", "ttlt": "last token"}
COLUMNS = ("target", "kind", ">batch", ">prompt", ">median ms", ">p10", ">p90", ">n", ">error",
           ">memory", ">speed-up")  # fmt: skip


@dataclass(frozen=True)
class Report:
    """A run: the target first, then the baseline where there is one."""

    subjects: Sequence[Subject]
    plan: Plan
    result: Result
    device: torch.device
    seed: int

    def speedup(self, of: Measurement) -> float | None:
        """The baseline's median over this one, of the target's measurements."""
        if len(self.subjects) < 2 or of.target != self.subjects[0].name:
            return None
        found = self._find(self.subjects[1].name, of.workload)
        return found.timing.median_ms / of.timing.median_ms if found else None

    def _find(self, target: str, workload: Workload) -> Measurement | None:
        every = self.result.measurements
        return next((m for m in every if (m.target, m.workload) == (target, workload)), None)

    def to_json(self) -> dict[str, Any]:
        """As plain data; `size` is the target's weights in bytes."""
        return {
            "target": self.subjects[0].name,
            "size": self.subjects[0].weight_bytes,
            "baseline": self.subjects[1].name if len(self.subjects) > 1 else None,
            "baseline_size": self.subjects[1].weight_bytes if len(self.subjects) > 1 else None,
            "measurements": [self._row(m) for m in self.result.measurements],
            "wrong": [_workload(w) | {"error": str(error)} for w, error in self.result.wrong],
            "tolerance": self.plan.tolerance,
            "seed": self.seed,
            "device": device_name(self.device),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
        }

    def _row(self, m: Measurement) -> dict[str, Any]:
        timing, more = m.timing, {"tokens": m.workload.tokens}
        return {"target": m.target, **_workload(m.workload),
                "median_ms": timing.median_ms, "p10_ms": timing.p10_ms, "p90_ms": timing.p90_ms,
                "n": timing.n, **more, "error": m.error, "memory_bytes": m.memory_bytes,
                "speedup": self.speedup(m)}  # fmt: skip

    def rows(self) -> list[tuple[str, ...]]:
        """The cells under COLUMNS."""
        return [self._cells(m) for m in self.result.measurements]

    def _cells(self, m: Measurement) -> tuple[str, ...]:
        timing, speedup = m.timing, self.speedup(m)
        times = [f"{t:.3f}" for t in (timing.median_ms, timing.p10_ms, timing.p90_ms)]
        error = "" if m.error is None else f"{m.error:.1e}"
        memory = "" if m.memory_bytes is None else f"{m.memory_bytes / 1e6:.0f} MB"
        prompt = str(m.workload.prompt) + (f"+{m.workload.tokens}" if m.workload.tokens > 1 else "")
        return (m.target, m.workload.kind, str(m.workload.batch), prompt, *times, str(timing.n),
                error, memory, "" if speedup is None else f"{speedup:.2f}x")  # fmt: skip

    def plot(self, out: Path) -> None:
        """Bars of the medians with p10 and p90, a panel for each kind; UsageError without a way."""
        panels = list(dict.fromkeys(m.workload.kind for m in self.result.measurements))
        if not panels:
            raise UsageError("nothing was timed, so there is nothing to plot")
        pyplot = _pyplot()
        figure, axes = pyplot.subplots(
            1, len(panels), figsize=(5 * len(panels), 4), squeeze=False, layout="constrained"
        )
        for axis, kind in zip(axes[0], panels, strict=True):
            self._draw(axis, [m for m in self.result.measurements if m.workload.kind == kind])
            axis.set_title(f"time to {LABELS[kind]}" if kind != "tpot" else "time per token")
        axes[0][0].set_ylabel("ms")
        axes[0][0].legend()
        figure.suptitle(device_name(self.device))
        try:
            figure.savefig(out, dpi=150)
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot write {out}: {error}", hint="name a .png file") from None
        finally:
            pyplot.close(figure)

    def _draw(self, axis: Any, found: Sequence[Measurement]) -> None:
        workloads = list(dict.fromkeys(m.workload for m in found))
        names = [subject.name for subject in self.subjects]
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            mine = [m for m in found if m.target == name]
            places = [workloads.index(m.workload) + (i + 0.5) * width - 0.4 for m in mine]
            heights = [m.timing.median_ms for m in mine]
            below = [m.timing.median_ms - m.timing.p10_ms for m in mine]
            above = [m.timing.p90_ms - m.timing.median_ms for m in mine]
            axis.bar(places, heights, width, yerr=[below, above], label=name, capsize=2)
        labels = [f"batch {w.batch}\n{w.prompt}" + (f"+{w.tokens}" if w.tokens > 1 else "")
                  for w in workloads]  # fmt: skip
        axis.set_xticks(range(len(workloads)), labels)


def _workload(workload: Workload) -> dict[str, Any]:
    return {"kind": workload.kind, "batch": workload.batch, "prompt": workload.prompt}


def check_plot(out: Path) -> None:
    """Raise UsageError where no plot can be written to `out`."""
    _pyplot()
    if not out.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {out.absolute().parent}", hint="make it first")


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UsageError(
            "plots need matplotlib, which is not installed", hint="pip install 'ssmc[bench]'"
        ) from None
    matplotlib.use("agg")
    import matplotlib.pyplot as pyplot

    return pyplot


def device_name(device: torch.device) -> str:
    """The device as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of ssmc and of what a measurement depends on, as far as it is installed."""
    found = {"ssmc": ssmc.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
