"""How long does a kernel take? Calls in a CUDA graph, chained as in use, on inputs not in cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernel_cases.case import Case
from kernel_cases.check import Difference, check, compare, reference, results, twin
from ssmc.bench.timing import Timing, run_times, summary

CACHE_BYTES = 120e6  # twice the 60 MB of an H200's L2: inputs older than that are not in it
MAX_SETS = 64
CALLS = 40  # at least so many a graph, so that the start of the graph does not count
CHAINED = 3  # calls in a row whose results are all compared
REPLAYS, SECONDS = 20, 0.15

BANDWIDTH = 4.3e12  # bytes/s, device to device copy, read plus written; measured
RATES = {  # operations/s; bf16 measured (8192 cubed product), the others assumed from it
    "int8": 1500e12,
    "bf16": 790e12,
    "tf32": 400e12,
    "fp32": 60e12,
    "exp": 132 * 16 * 1.755e9,  # 16 a clock in each of 132 multiprocessors
}


@dataclass(frozen=True)
class Measured:
    """A kernel with one set of launch parameters: right or not, and the time of one call."""

    difference: Difference
    timing: Timing | None


def floor_us(case: Case) -> float:
    """The least time in microseconds: bytes at memory bandwidth, or operations at their rate."""
    return 1e6 * max(case.bytes / BANDWIDTH, case.operations / RATES[case.unit])


class Prepared:
    """A case's sets of fresh inputs, together larger than the cache, and what the first give."""

    def __init__(self, case: Case, device: torch.device) -> None:
        count = min(max(math.ceil(CACHE_BYTES / case.bytes), CHAINED), MAX_SETS)
        self.sets = [case.inputs(device) for _ in range(count)]
        self.expected = [reference(case, inputs) for inputs in self.sets[:CHAINED]]


def compile_kernel(case: Case, device: torch.device, config: dict[str, Any]) -> None:
    """Run the kernel once, so that what it compiles lies in Triton's cache."""
    case.kernel(*case.inputs(device), **config)
    torch.cuda.synchronize(device)


def measure(
    case: Case, prepared: Prepared, device: torch.device, config: dict[str, Any]
) -> Measured:
    """Check the kernel, alone and in a chain, and time it where it is right."""
    sets, expected = prepared.sets, prepared.expected
    found = check(case, sets[0], expected[0], config)
    if not found.problem:
        found = _check_chain(case, sets, expected, config)
    return Measured(found, None if found.problem else _time(case, sets, device, config))


def _check_chain(
    case: Case,
    sets: Sequence[tuple[Any, ...]],
    expected: Sequence[list[Tensor]],
    config: dict[str, Any],
) -> Difference:
    """The worst difference of calls that start before the one in front has ended."""
    given = [tuple(map(twin, inputs)) for inputs in sets[: len(expected)]]
    got: list[list[Tensor]] = []
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got += [results(case.kernel(*inputs, **config)) for inputs in given]
    graph.replay()
    found = [compare(case, a, b) for a, b in zip(got, expected, strict=True)]
    return max(found, key=lambda d: (bool(d.problem), d.error, d.flips))


def _time(
    case: Case, sets: Sequence[tuple[Any, ...]], device: torch.device, config: dict[str, Any]
) -> Timing:
    """The time of one call; states that the kernel writes over are run on and on."""
    rounds = math.ceil(CALLS / len(sets))
    given = [tuple(map(twin, inputs)) for inputs in sets]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in rounds * given:
            case.kernel(*inputs, **config)
    once = max(min(run_times(graph.replay, device, 3)), 1e-3)
    replays = max(REPLAYS, min(200, int(1e3 * SECONDS / once)))
    return summary(run_times(graph.replay, device, replays)).scaled(1 / (rounds * len(sets)))
