"""Time of each kernel for CPUs beside its floor, as a tape of decoding or a prompt launches it.

    python tools/bench_cpu_kernels.py
    python tools/bench_cpu_kernels.py --only scan --only convolution --threads 2
    python tools/bench_cpu_kernels.py --threads 1 --step OUT

What the processor does a second is measured first, with the helpers that kernels are made of: bytes
read or copied, in sets of many sizes; products of int8, of float32, and exponentials. The floor of
a kernel is the larger of two times: its bytes, each operand read and each result written once, and
the sum of its operations, which take turns at the same units. A step is timed with as many sets of
operands as the model has layers, one after the other, a prompt with one. A time is the median of
all runs of some rounds, in which numbers of threads take turns, beside the fastest. With --step it
takes apart a step of an artefact behind 512 tokens instead: how often each kernel is launched, and
what that takes in all.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as `ssmc` has it, before torch loads

import torch
from cpu_cases.case import Case
from cpu_cases.models import PROMPT, cases
from cpu_cases.rates import Rates, fastest, measure, seconds

from ssmc.kernels.cpu.launch import Tape
from ssmc.kernels.cpu.threads import threads
from ssmc.native.threads import Entries
from ssmc.runtime import load

LONG, ROUNDS, ROUND = 2e-4, 5, 0.015  # seconds of a tape, at least; of a round of its runs
RUNS, REPEATED = 60, 20  # of a step that is taken apart

HEADER = """\
| model | kernel | shape | kB | products, k | floats, k | exponentials, k | floor, us | reached | \
fastest | ratio |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


@dataclass(frozen=True)
class Measured:
    """Seconds of a call, by the number of threads."""

    moved: int
    floors: list[float]
    medians: list[float]
    fastest: list[float]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the rates, then each case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="kernels whose model and name, as printed, have this in them",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--step", metavar="OUT", help="an artefact, compiled for the CPU")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    chosen = [case for case in cases() if _is_named(case, arguments.only)]
    if not chosen:
        parser.error(f"no kernel has {' or '.join(arguments.only)} in its model and name")
    if arguments.step:
        torch.set_num_threads(arguments.threads[0])
        _take_apart(arguments.step)
    else:
        rates = {count: measure(count) for count in arguments.threads}
        _print_table(chosen, rates, arguments.rounds)


def _is_named(case: Case, names: Sequence[str]) -> bool:
    return not names or any(name in f"{case.model} {case.kernel}" for name in names)


def _print_table(chosen: Iterable[Case], rates: dict[int, Rates], rounds: int) -> None:
    for count, found in rates.items():
        print(f"{count} threads: {found}")
    print(f"\n{HEADER}")
    for case in chosen:
        print(row(case, time_case(case, rates, rounds)), flush=True)


def row(case: Case, measured: Measured) -> str:
    """A row of the table; what differs by the number of threads stands side by side."""
    work = (measured.moved, case.products, case.floats, case.exponentials)
    ratios = [m / f for m, f in zip(measured.medians, measured.floors, strict=True)]
    times = (_cells(measured.floors), _cells(measured.medians), _cells(measured.fastest))
    cells = [case.model, case.kernel, case.shape, *(_number(w / 1000) for w in work), *times,
             " / ".join(map(_number, ratios))]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _cells(times: Iterable[float]) -> str:
    return " / ".join(_number(1e6 * time) for time in times)


def _number(value: float) -> str:
    """Two digits of what is small, whole numbers of what is large."""
    if not value:
        return ""
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def time_case(case: Case, rates: dict[int, Rates], rounds: int) -> Measured:
    """A call of the case with each number of threads, which take turns."""
    operands = [case.inputs() for _ in range(case.sets)]
    moved = case.moved(operands[0], case.run(*operands[0]))
    once = _tape(case, operands)
    calls = case.sets * max(1, int(LONG / fastest(once.run, 3)))
    tapes = {}
    for count in rates:
        torch.set_num_threads(count)
        tapes[count] = _tape(case, operands * (calls // case.sets))
    times = {count: [t / calls for t in ts] for count, ts in _runs(tapes, rounds).items()}
    return Measured(
        moved.bytes,
        [case.floor(moved, found) for found in rates.values()],
        [statistics.median(ts) for ts in times.values()],
        [min(ts) for ts in times.values()],
    )


def _tape(case: Case, operands: Iterable[tuple[Any, ...]]) -> Tape:
    with Tape() as tape:
        for given in operands:
            case.run(*given)
    return tape


def _runs(tapes: dict[int, Tape], rounds: int) -> dict[int, list[float]]:
    """Seconds of runs of each tape."""
    times = defaultdict[int, list[float]](list)
    for _ in range(rounds):
        for count, tape in tapes.items():
            torch.set_num_threads(count)
            once = min(seconds(tape.run), seconds(tape.run))
            runs = max(3, min(50, int(ROUND / once)))
            times[count] += [seconds(tape.run) for _ in range(runs)]
    return times


def _take_apart(artefact: str) -> None:
    """The launches of a step by kernel; each is repeated by itself, so its operands are near."""
    session = load(artefact, "cpu", "cpu").session(1)
    session.prefill(torch.ones(1, PROMPT, dtype=torch.int64))
    token = torch.ones(1, 1, dtype=torch.int64)
    session.step(token)
    tape = session._recordings[1].tape  # type: ignore[union-attr]
    launches = [entry for part in tape.parts if isinstance(part, list) for entry in part]
    times, counts = defaultdict[str, float](float), Counter[str]()
    for entry, kept in zip(launches, tape.kept, strict=True):
        name, repeated = kept[0].function.__name__, Entries([entry] * REPEATED)
        counts[name] += 1
        times[name] += fastest(lambda e=repeated: threads().run(e), RUNS) / REPEATED  # type: ignore[misc]
        session.reset()
        session.states.get("position", token).fill_(PROMPT)
    for name in sorted(times, key=times.__getitem__, reverse=True):
        print(f"{1e6 * times[name]:8.1f} us {counts[name]:4d} x {name}")
    calls = len(tape.parts) - sum(isinstance(part, list) for part in tape.parts)
    print(
        f"{1e6 * sum(times.values()):8.1f} us {len(launches):4d} launches, {calls} calls of torch"
    )
    print(f"{1e6 * fastest(lambda: session.step(token), RUNS):8.1f} us the step")


if __name__ == "__main__":
    main()
