"""What was measured, as data and as the rows of tables."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import ssmc
from ssmc.bench.measure import Measurement, Plan, Result, Workload
from ssmc.bench.subjects import Subject

PACKAGES = ("torch", "triton", "transformers", "mamba-ssm", "causal-conv1d")
COLUMNS = ("target", "kind", ">batch", ">prompt", ">median ms", ">p10", ">p90", ">n", ">error",
           ">memory", ">speed-up")  # fmt: skip


@dataclass(frozen=True)
class Report:
    """A run: the targets, then the baseline where there is one."""

    subjects: Sequence[Subject]
    plan: Plan
    result: Result
    device: torch.device
    seed: int
    baseline: Subject | None = None

    def speedup(self, of: Measurement) -> float | None:
        """How many times as fast as the baseline, or without one as the first target."""
        other = self.baseline or self.subjects[0]
        if of.target == other.name:
            return None
        found = self._find(other.name, of.workload)
        return found.timing.median_ms / of.timing.median_ms if found else None

    def _find(self, target: str, workload: Workload) -> Measurement | None:
        every = self.result.measurements
        return next((m for m in every if (m.target, m.workload) == (target, workload)), None)

    def to_json(self) -> dict[str, Any]:
        """As plain data; `size` is the first target's weights in bytes, `sizes` everyone's."""
        baseline = self.baseline
        return {
            "target": self.subjects[0].name,
            "size": self.subjects[0].weight_bytes,
            "sizes": {subject.name: subject.weight_bytes for subject in self.subjects},
            "baseline": baseline.name if baseline is not None else None,
            "baseline_size": baseline.weight_bytes if baseline is not None else None,
            "measurements": [self._row(m) for m in self.result.measurements],
            "wrong": [
                {"target": name, **_workload(w), "error": str(error)}
                for name, w, error in self.result.wrong
            ],
            "tolerance": self.plan.tolerance,
            "process_peak_bytes": peak_memory(),
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

    def comparison(self) -> tuple[list[str], list[list[str]]]:
        """A column for each subject, a row for each workload: medians, and the bytes of weights."""
        columns = ["median ms", *(f">{subject.name}" for subject in self.subjects)]
        workloads = dict.fromkeys(m.workload for m in self.result.measurements)
        rows = [[label(w), *(self._median(s.name, w) for s in self.subjects)] for w in workloads]
        sizes = [f"{subject.weight_bytes / 1e6:.2f} MB" for subject in self.subjects]
        return columns, [*rows, ["weights", *sizes]]

    def _median(self, target: str, workload: Workload) -> str:
        found = self._find(target, workload)
        if found is None:
            return ""
        speedup = self.speedup(found)
        text = f"{found.timing.median_ms:.3f}"
        return text if speedup is None else f"{text} ({speedup:.2f}x)"


def label(workload: Workload) -> str:
    """A workload in few words."""
    tokens = f"+{workload.tokens}" if workload.tokens > 1 else ""
    return f"{workload.kind} {workload.prompt}{tokens}, batch {workload.batch}"


def _workload(workload: Workload) -> dict[str, Any]:
    return {"kind": workload.kind, "batch": workload.batch, "prompt": workload.prompt}


def peak_memory() -> int:
    """The most bytes of main memory that this process has held at a time, libraries and all."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kilobytes


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
