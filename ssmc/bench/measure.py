"""Measures subjects side by side: first whether they are right, then how long they take."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ssmc.bench.check import Oracle
from ssmc.bench.subjects import Compiled, Runner, Subject
from ssmc.bench.timing import Timing, run_times, summary

Kind = Literal["ttft", "tpot", "ttlt"]
WARM_UP = 3
ROUNDS = 5  # subjects take turns, so that a clock that drifts is the same for all
TPOT_PROMPT = 16  # tokens before the first that is timed, so that no state is zero
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Workload:
    """What is timed: a prompt (ttft), one more token (tpot), or a prompt and `tokens` (ttlt)."""

    kind: Kind
    batch: int
    prompt: int
    tokens: int = 1


@dataclass(frozen=True)
class Plan:
    """Prompts to time the first token of; whether to time a token; (prompt, tokens) to the last.

    Each at each batch. `n` runs of each, a tenth of it (3 at least) to the last token. A compiled
    model whose logits differ from the reference's by more than `tolerance` is not timed. That has
    to be wide: a float at the edge of two integers falls to either side by its last bit, and what
    follows carries it on (docs/performance.md has figures). `ssmc verify` is the narrow check.
    """

    ttft: Sequence[int] = (512,)
    tpot: bool = True
    ttlt: Sequence[tuple[int, int]] = ()
    batches: Sequence[int] = (1,)
    n: int = 50
    tolerance: float = 0.3

    def workloads(self, batch: int) -> list[Workload]:
        """What to time at a batch."""
        found = [Workload("ttft", batch, prompt) for prompt in self.ttft]
        found += [Workload("tpot", batch, TPOT_PROMPT)] if self.tpot else []
        return found + [Workload("ttlt", batch, prompt, n) for prompt, n in self.ttlt]

    def runs(self, workload: Workload) -> int:
        """How often to run a workload."""
        return max(3, self.n // 10) if workload.kind == "ttlt" else self.n


@dataclass(frozen=True)
class Measurement:
    """The timing of one subject at one workload.

    `error` is the relative error of its logits, `memory_bytes` its weights and what its run asked
    for on top at the peak; None where it was not checked, or not on a GPU.
    """

    target: str
    workload: Workload
    timing: Timing
    error: float | None
    memory_bytes: int | None


@dataclass
class Result:
    """Measurements, and (target, workload, error) of what is wrong and was therefore not timed."""

    measurements: list[Measurement] = field(default_factory=list)
    wrong: list[tuple[str, Workload, float]] = field(default_factory=list)


class _Entrant:
    """A subject with the runner of a batch, what was found wrong, and the memory it took."""

    def __init__(
        self, subject: Subject, batch: int, oracle: Oracle | None, memory: _Memory
    ) -> None:
        self.subject, self.batch, self.oracle, self.memory = subject, batch, oracle, memory
        with memory.held():
            self.runner = subject.open(batch)

    def error(self, prompt: int) -> float | None:
        """The relative error of the logits of fresh sequences; None where nothing is known."""
        if self.oracle is None:
            return None
        return self.oracle.error(self.runner, self.batch, prompt)


class _Memory:
    """Bytes that an entrant keeps, and those it asks for on top while it runs."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.kept, self.peak = device, 0, 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Count what the context leaves behind, the pools of CUDA graphs too."""
        gc.collect()  # what others left behind would come off the count
        before = self._reserved()
        yield
        self.kept += self._reserved() - before

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count what the context asks for at its peak."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        yield
        self.peak = torch.cuda.max_memory_allocated(self.device) - before

    def _reserved(self) -> int:
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self.device)


@torch.no_grad()
def measure(
    subjects: Sequence[Subject],
    plan: Plan,
    device: torch.device,
    progress: Progress = lambda done, total: None,
) -> Result:
    """Measure the subjects in turns, batch by batch; compiled models are checked first and last."""
    oracles = [Oracle(s.reference(), device) if isinstance(s, Compiled) else None for s in subjects]
    result, done = Result(), 0
    total = sum(len(plan.workloads(batch)) for batch in plan.batches)
    for batch in plan.batches:
        entrants = [
            _Entrant(subject, batch, oracle, _Memory(device))
            for subject, oracle in zip(subjects, oracles, strict=True)
        ]
        for workload in plan.workloads(batch):
            progress(done, total)
            _measure(entrants, workload, plan, result)
            done += 1
        del entrants
        gc.collect()
    progress(done, total)
    return result


def _measure(entrants: Sequence[_Entrant], workload: Workload, plan: Plan, result: Result) -> None:
    """Check, warm up, time in turns, check again."""
    right, runs = [], []
    for entrant in entrants:
        if entrant.oracle is not None:
            entrant.oracle.answer(workload.prompt)  # its memory is not the entrant's
        with entrant.memory.held():
            error = entrant.error(workload.prompt)
            if error is not None and not error <= plan.tolerance:
                result.wrong.append((entrant.subject.name, workload, error))
                continue
            run = _run_of(entrant, workload)
            with entrant.memory.running():
                for _ in range(1 if workload.kind == "ttlt" else WARM_UP):
                    run()
        right.append(entrant)
        runs.append(run)
    times: list[list[float]] = [[] for _ in right]
    left = plan.runs(workload)
    while left > 0:
        share = min(left, math.ceil(plan.runs(workload) / ROUNDS))
        for entrant, run, found in zip(right, runs, times, strict=True):
            found += run_times(run, entrant.memory.device, share)
        left -= share
    for entrant, found in zip(right, times, strict=True):
        _conclude(entrant, workload, summary(found), plan, result)


def _conclude(
    entrant: _Entrant, workload: Workload, timing: Timing, plan: Plan, result: Result
) -> None:
    """A measurement, unless the runs have left something behind that makes the logits wrong."""
    error, memory = entrant.error(workload.prompt), entrant.memory
    if error is not None and not error <= plan.tolerance:
        result.wrong.append((entrant.subject.name, workload, error))
        return
    total = entrant.subject.weight_bytes + memory.kept + memory.peak
    taken = total if memory.device.type == "cuda" else None
    result.measurements.append(Measurement(entrant.subject.name, workload, timing, error, taken))


def _run_of(entrant: _Entrant, workload: Workload) -> Callable[[], object]:
    """The function to time, its runner in the state to begin from."""
    runner, device = entrant.runner, entrant.memory.device
    shape = (workload.batch, workload.prompt + 1)
    ids = torch.randint(0, entrant.subject.vocabulary, shape, device=device)
    prompt, after = ids[:, :-1].contiguous(), ids[:, -1:].contiguous()
    if workload.kind == "tpot":
        _first_token(runner, prompt)
        return lambda: runner.step(after)
    if workload.kind == "ttft":
        return lambda: _first_token(runner, prompt)
    return lambda: _last_token(runner, prompt, workload.tokens)


def _first_token(runner: Runner, prompt: Tensor) -> Tensor:
    runner.reset()
    return runner.prefill(prompt)


def _last_token(runner: Runner, prompt: Tensor, tokens: int) -> Tensor:
    ids = _first_token(runner, prompt).argmax(-1, keepdim=True)
    for _ in range(tokens - 1):
        ids = runner.step(ids).argmax(-1, keepdim=True)
    return ids
