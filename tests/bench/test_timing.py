"""Times of runs and their percentiles."""

from __future__ import annotations

import time

import pytest
import torch

from ssmc.bench.timing import Timing, run_times, summary


def test_summary() -> None:
    found = summary([float(i) for i in range(101)])
    assert (found.median_ms, found.p10_ms, found.p90_ms, found.n) == (50, 10, 90, 101)
    assert summary([3.0]) == Timing(3.0, 3.0, 3.0, 1)
    assert found.scaled(0.5) == Timing(25, 5, 45, 101)


def test_times_of_runs_on_a_cpu() -> None:
    times = run_times(lambda: time.sleep(0.002), torch.device("cpu"), 4)
    assert len(times) == 4
    assert min(times) >= 2


@pytest.mark.gpu
def test_times_of_runs_on_a_gpu() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    (x @ x).sum()
    times = run_times(lambda: x @ x, torch.device("cuda"), 5)
    assert len(times) == 5
    assert min(times) > 1e-2
