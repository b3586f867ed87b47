"""What the processor does a second at most, measured with the helpers that kernels are made of."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ssmc.kernels.cpu.kernel import Kernel, kernel
from ssmc.kernels.cpu.launch import Tape, launch
from ssmc.kernels.cpu.numbers import exp2
from ssmc.kernels.cpu.products import TILE_W, TILE_X, tile_product
from ssmc.kernels.cpu.vectors import ROWS
from ssmc.kernels.cpu.words import arguments_at, float32_at, int64_at, share

RUNS = 60
SHARED = 2**20  # work that all threads take part in
SIZES = tuple(2**i for i in range(14, 29))  # bytes of the sets that are moved


@dataclass(frozen=True)
class Rates:
    """Of one number of threads, a second; `moved` are pairs of (bytes of a set, bytes a second)."""

    products: float
    floats: float
    exponentials: float
    launches: float
    moved: tuple[tuple[int, float], ...]

    def bandwidth(self, size: int) -> float:
        """Bytes a second of a set of `size` bytes: of the largest set measured that is no larger.

        So it is rather too high than too low.
        """
        place = bisect_right([measured for measured, _ in self.moved], size)
        return self.moved[max(0, place - 1)][1]

    def __str__(self) -> str:
        sets = (f"{rate / 1e9:.0f} GB/s of {_bytes(size)}" for size, rate in self.moved[1::3])
        return (
            f"{self.products / 1e9:.0f} G products of int8, {self.floats / 1e9:.0f} G of float32, "
            f"{self.exponentials / 1e9:.2f} G exponentials a second; {1e6 / self.launches:.2f} us "
            f"a launch; {', '.join(sets)}"
        )


def _bytes(size: int) -> str:
    return f"{size >> 20} MB" if size >= 2**20 else f"{size >> 10} KB"


def measure(threads: int, sizes: tuple[int, ...] = SIZES, runs: int = RUNS) -> Rates:
    """The rates of so many threads together."""
    torch.set_num_threads(threads)
    return Rates(
        _products(threads, runs),
        _floats(runs),
        _exponentials(threads, runs),
        100 / _best(_nothing, *[()] * 100, runs=runs),
        tuple((size, _bandwidth(size, runs)) for size in sizes),
    )


@kernel()
def _nothing(arguments: int, thread: int, threads: int) -> None:
    pass


@kernel()
def _read(arguments: int, thread: int, threads: int) -> None:
    x, count, times, out = arguments_at(arguments, 4)
    part = share(count, thread, threads)
    values, total = int64_at(x + 8 * part.start, len(part)), 0
    for _ in range(times):
        for i in range(len(values)):
            total += values[i]
    int64_at(out + 32 * thread, 1)[0] = total


@kernel()
def _copy(arguments: int, thread: int, threads: int) -> None:
    x, count, times, out = arguments_at(arguments, 4)
    part = share(count, thread, threads)
    values = int64_at(x + 8 * part.start, len(part))
    copied = int64_at(out + 8 * part.start, len(part))
    for _ in range(times):
        for i in range(len(values)):
            copied[i] = values[i]


@kernel()
def _exponentiate(arguments: int, thread: int, threads: int) -> None:
    x, n, times, out = arguments_at(arguments, 4)
    values, y = float32_at(x, n), float32_at(out + 4 * n * thread, n)
    for _ in range(times):
        for i in range(n):
            y[i] = exp2(values[i])


@kernel()
def _multiply(arguments: int, thread: int, threads: int) -> None:
    x, k, packed, times, out = arguments_at(arguments, 5)
    mine = out + 4 * TILE_X * TILE_W * ROWS * thread
    for _ in range(times):
        tile_product(mine, x, k, TILE_X, packed, k // 4)


def _bandwidth(size: int, runs: int) -> float:
    """The larger of reading and of copying, whose set is half read and half written."""
    x, out = torch.zeros(size // 8, dtype=torch.int64), torch.empty(8 * torch.get_num_threads())
    times = max(1, 2**24 // size)
    runs = max(3, min(runs, 2**31 // size // times))
    reading = _best(_read, (x, size // 8, times, out), runs=runs)
    copying = _best(_copy, (x, size // 16, times, x[size // 16 :]), runs=runs)
    return size * times / min(reading, copying)


def _exponentials(threads: int, runs: int, n: int = 1024, times: int = 500) -> float:
    x, y = torch.randn(n), torch.empty(threads * n)
    return threads * n * times / _best(_exponentiate, (x, n, times, y), runs=runs)


def _products(threads: int, runs: int, k: int = 512, times: int = 1000) -> float:
    x, packed = torch.zeros(TILE_X, k).char(), torch.zeros(k, ROWS * TILE_W).char()
    out = torch.empty(threads, TILE_X, TILE_W * ROWS, dtype=torch.int32)
    each = packed.numel() * TILE_X * times
    return threads * each / _best(_multiply, (x, k, packed, times, out), runs=runs)


def _floats(runs: int, n: int = 1024) -> float:
    """Of torch's matrix product, which comes closer to the processor's rate than kernels here."""
    square = torch.randn(n, n)
    return n**3 / fastest(lambda: square @ square, min(runs, 10))


def _best(function: Kernel, *calls: tuple[Any, ...], runs: int) -> float:
    with Tape() as tape:
        for arguments in calls:
            launch(function, *arguments, work=SHARED)
    return fastest(tape.run, runs)


def fastest(run: Callable[[], object], runs: int) -> float:
    """Seconds of the fastest of some runs."""
    return min(seconds(run) for _ in range(runs))


def seconds(run: Callable[[], object]) -> float:
    """Seconds of a run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
