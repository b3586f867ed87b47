"""Timing: warm up, run many times, give the median and how far the rest lies from it."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Median, 10th and 90th percentile of `n` runs, in milliseconds."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    n: int

    def scaled(self, factor: float) -> Timing:
        """The timing of a part of the run: of one call where the run made several."""
        return Timing(self.median_ms * factor, self.p10_ms * factor, self.p90_ms * factor, self.n)


def summary(times: Sequence[float]) -> Timing:
    """The timing that single times in milliseconds add up to."""
    if len(times) == 1:
        return Timing(times[0], times[0], times[0], 1)
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(statistics.median(times), deciles[0], deciles[-1], len(times))


def run_times(run: Callable[[], object], device: torch.device, n: int) -> list[float]:
    """Milliseconds that each of `n` runs took: by events on a GPU, by the clock on a CPU.

    On a GPU the runs follow each other without a wait in between, so the time the host takes to
    launch one hides behind the one before it, as in a loop that decodes.
    """
    if device.type != "cuda":
        return [_clocked(run) for _ in range(n)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def _clocked(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)
