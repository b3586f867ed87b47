"""Work in processes of their own: it may hang, or spoil a CUDA context, and the rest goes on."""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

CONTEXT = multiprocessing.get_context("spawn")  # CUDA does not survive a fork


class Failure(Exception):
    """What a task ended with instead of a result."""


class _Worker:
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_serve, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self) -> tuple[Any, bool]:
        """The result, and whether the process can go on."""
        try:
            result: tuple[Any, bool] = self.pipe.recv()
        except EOFError:
            return Failure("the process died"), False
        return result


def run_all(
    function: Callable[[Any], Any], tasks: Sequence[Any], count: int, seconds: float
) -> Iterator[tuple[int, Any]]:
    """(index, result or Failure) of each task as it ends, by `count` processes.

    A task that takes more than `seconds` is ended with its process.
    """
    todo = deque(enumerate(tasks))
    idle = [_Worker(function) for _ in range(min(count, len(tasks)))]
    busy: dict[Connection, tuple[_Worker, int, float]] = {}
    while todo or busy:
        while todo and idle:
            worker, (index, task) = idle.pop(), todo.popleft()
            worker.pipe.send(task)
            busy[worker.pipe] = (worker, index, time.monotonic() + seconds)
        ready = wait(busy, timeout=1)
        for pipe in [p for p in busy if p in ready]:
            worker, index, _ = busy.pop(pipe)
            result, alive = worker.receive()
            yield index, result
            idle.append(worker if alive else _replaced(worker, function))
        for pipe in [p for p, (_, _, end) in busy.items() if time.monotonic() > end]:
            worker, index, _ = busy.pop(pipe)
            yield index, Failure(f"no end after {seconds:.0f} s")
            idle.append(_replaced(worker, function))
    for worker in idle:
        worker.process.kill()


def _replaced(worker: _Worker, function: Callable[[Any], Any]) -> _Worker:
    worker.process.kill()
    worker.process.join()
    return _Worker(function)


def _serve(pipe: Connection, function: Callable[[Any], Any]) -> None:
    while True:
        task = pipe.recv()
        try:
            result = function(task)
        except Exception as error:  # whatever a kernel raises is that task's result
            lines = str(error).strip().splitlines() or [""]
            result = Failure(f"{type(error).__name__}: {lines[0]} {lines[-1]}")
        pipe.send((result, not _spoilt()))


def _spoilt() -> bool:
    """Whether CUDA refuses to go on in this process."""
    import torch

    try:
        torch.cuda.synchronize()
    except Exception:
        return torch.cuda.is_available()
    return False
