"""Check and time the kernels at the sizes of published models, on a CUDA device.

    python tools/bench_kernels.py [--only PATTERN] [--configs] [--top N] [--json FILE] [--markdown]

Each case of `tools/kernel_cases` is compared with its operator on fresh random inputs; what differs
by more than the case allows is reported as FAILED, not timed, and makes the exit code 1. The floor
is the larger of the bytes at memory bandwidth and the operations at their unit's rate.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import importlib
import json
import pkgutil
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import kernel_cases
import torch
from kernel_cases.case import Case
from kernel_cases.measure import Measured, Prepared, compile_kernel, floor_us, measure
from kernel_cases.processes import Failure, run_all

COMPILERS = 12
COMPILE_SECONDS, MEASURE_SECONDS = 150.0, 60.0
FAILED, SKIPPED = "FAILED", "skipped"
HEADER = ("case", "config", "us", "p90", "floor", "ratio", "error")


@dataclass(frozen=True)
class Task:
    """A case by family and index, since functions do not travel between processes."""

    family: str
    index: int
    config: dict[str, Any]
    seed: int

    @property
    def case(self) -> Case:
        """The case."""
        return family_cases(self.family)[self.index]


@dataclass(frozen=True)
class Row:
    """What was found for a case and a set of launch parameters; no time where it did not run.

    `status` is `ok`; `FAILED`: wrong, or its own choice of parameters did not run; or `skipped`:
    parameters that a kernel does not compile with.
    """

    case: str
    config: dict[str, Any]
    floor_us: float
    us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    error: float | None = None
    flips: float | None = None
    status: str = "ok"
    problem: str = ""

    def cells(self) -> tuple[str, ...]:
        """The cells under HEADER."""
        chosen = " ".join(_short(key, value) for key, value in self.config.items())
        if self.us is None or self.p90_us is None:
            return (self.case, chosen, self.status, self.problem)
        times = [f"{t:.1f}" if t >= 100 else f"{t:.2f}" for t in (self.us, self.p90_us)]
        ratio = f"{self.us / self.floor_us:.2f}"
        return (self.case, chosen, *times, f"{self.floor_us:.2f}", ratio, self.accuracy())

    def accuracy(self) -> str:
        """The relative error of floats and the share of integers that differ."""
        return f"{self.error or 0:.0e}" + (f" f{self.flips:.0e}" if self.flips else "")


def _short(key: str, value: Any) -> str:
    """A launch parameter in few letters; of several in one, those that are not the default."""
    if not is_dataclass(value):
        name = key.removeprefix("num_").removeprefix("block_")[:5]
        return name if value is True else f"{name}{value}"
    changed = [f.name for f in fields(value) if getattr(value, f.name) != f.default]
    return " ".join(_short(name, getattr(value, name)) for name in changed)


def families() -> list[str]:
    """The modules that may hold cases."""
    return sorted(module.name for module in pkgutil.iter_modules(kernel_cases.__path__))


def family_cases(family: str) -> tuple[Case, ...]:
    """The cases of a module, none where it only helps others."""
    return tuple(getattr(importlib.import_module(f"kernel_cases.{family}"), "CASES", ()))


def find_tasks(pattern: str, configs: bool, seed: int) -> tuple[list[Task], list[Row]]:
    """What to measure, and a row for each family that does not load."""
    tasks, broken = [], []
    for family in families():
        try:
            cases = family_cases(family)
        except Exception as error:  # one family that is broken must not hide the others
            problem = f"{type(error).__name__}: {error}"
            broken.append(Row(family, {}, 0.0, status=FAILED, problem=problem))
            continue
        for i, case in enumerate(cases):
            if fnmatch.fnmatch(f"{family}/{case.name}", f"*{pattern}*"):
                tried = ({}, *filter(None, case.configs)) if configs else ({},)
                tasks += [Task(family, i, dict(config), seed) for config in tried]
    return tasks, broken


def _compile(task: Task) -> None:
    compile_kernel(task.case, torch.device("cuda"), task.config)


def _measure(task: Task) -> Measured:
    prepared = _prepare(task.family, task.index, task.seed)
    return measure(task.case, prepared, torch.device("cuda"), task.config)


@functools.lru_cache(maxsize=1)
def _prepare(family: str, index: int, seed: int) -> Prepared:
    torch.cuda.empty_cache()
    torch.manual_seed(seed)
    return Prepared(family_cases(family)[index], torch.device("cuda"))


def run_tasks(tasks: Sequence[Task]) -> Iterator[list[Row]]:
    """The rows of each case: all is compiled in many processes, then measured in one."""
    rows: dict[int, Row] = {}
    for i, result in run_all(_compile, tasks, COMPILERS, COMPILE_SECONDS):
        if isinstance(result, Failure):
            rows[i] = _failed(tasks[i], str(result), SKIPPED if tasks[i].config else FAILED)
    good = [i for i in range(len(tasks)) if i not in rows]
    print(f"compiled {len(good)} of {len(tasks)}", file=sys.stderr, flush=True)
    measured = run_all(_measure, [tasks[i] for i in good], 1, MEASURE_SECONDS)
    for _, group in groupby(range(len(tasks)), lambda i: (tasks[i].family, tasks[i].index)):
        numbers = list(group)
        for i in numbers:
            if i not in rows:
                rows[i] = _row(tasks[i], next(measured)[1])  # by one process: in order
        yield [rows[i] for i in numbers]


def _row(task: Task, result: Measured | Failure) -> Row:
    if isinstance(result, Failure):
        return _failed(task, str(result), FAILED)
    difference, timing = result.difference, result.timing
    if timing is None:
        return _failed(task, difference.problem, FAILED)
    times = (1e3 * timing.median_ms, 1e3 * timing.p10_ms, 1e3 * timing.p90_ms)
    floor = floor_us(task.case)
    return Row(task.case.name, task.config, floor, *times, difference.error, difference.flips)


def _failed(task: Task, problem: str, status: str) -> Row:
    case = task.case
    return Row(case.name, task.config, floor_us(case), status=status, problem=problem)


def fastest(rows: Sequence[Row], top: int) -> list[Row]:
    """Of a case the kernel's own choice of parameters, what failed, and the `top` fastest."""
    tried = sorted((r for r in rows if r.config and r.us), key=lambda r: r.us or 0.0)
    return [r for r in rows if not r.config or r.us is None or r in tried[:top]]


def line(cells: Sequence[str]) -> str:
    """A line of at most 120 columns."""
    form = "{:36.36} {:38.38} {:>8} {:>8} {:>8} {:>5} {}"
    return (form if len(cells) == len(HEADER) else "{:36.36} {:38.38} {} {}").format(*cells)[:120]


def markdown(rows: Sequence[Row]) -> list[str]:
    """The kernels' own choices as the table of docs/performance.md."""
    head = ["| kernel | µs | p90 | floor µs | ratio | error |", "| --- " * 6 + "|"]
    return head + [
        "| " + " | ".join((row.case, *row.cells()[2:])) + " |"
        for row in rows
        if row.us is not None and not row.config
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 1 where a kernel is wrong, 4 without a CUDA device."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--only", default="", help="cases whose family/name has this in it; * ok")
    parser.add_argument("--configs", action="store_true", help="try every config of each case")
    parser.add_argument("--top", type=int, default=1000, help="show only the N fastest configs")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--markdown", action="store_true", help="print a table for the documents")
    parser.add_argument("--seed", type=int, default=secrets.randbits(31), help="of the inputs")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: there is no CUDA device", file=sys.stderr)
        return 4
    tasks, broken = find_tasks(options.only, options.configs, options.seed)
    rows: list[Row] = []
    print(line(HEADER))
    for found in chain(([row] for row in broken), run_tasks(tasks)):
        rows += found
        print("\n".join(line(row.cells()) for row in fastest(found, options.top)), flush=True)
        if options.json:
            options.json.write_text(json.dumps(_record(rows, options.seed), indent=1))
    if options.markdown:
        print("\n".join(markdown(rows)))
    return int(any(row.status == FAILED for row in rows))


def _record(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    about = {"device": torch.cuda.get_device_name(), "torch": str(torch.__version__), "seed": seed}
    return {"schema": 1, **about, "kernels": [asdict(row) for row in rows]}


if __name__ == "__main__":
    sys.exit(main())
