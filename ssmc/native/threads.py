"""Threads that run a list of kernels together: all threads do a share of each, then wait.

What they run is compiled (`ssmc.kernels.cpu.threads`), and called here without Python's lock.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

WORTH_WAKING = 2**18  # numbers to handle: some 30 us of one thread

# What threads share: int64 words, each on a cache line of its own.
LINE = 8
ARRIVED, PHASE, JOB, ENTRIES, COUNT, THREADS, WORKERS = (LINE * i for i in range(7))
ASLEEP, SEMAPHORE, WORKER = 0, LINE, 2 * LINE  # of a worker, from WORKERS on

RunFunction = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)
WorkFunction = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 2)


class Entries:
    """Launches of kernels in order.

    Each is three int64: a kernel's address, that of its arguments, and its work, in numbers it
    handles.
    """

    def __init__(self, launches: Sequence[tuple[int, int, int]]) -> None:
        self.table = (ctypes.c_int64 * (3 * len(launches)))(*chain.from_iterable(launches))
        self.address, self.count = ctypes.addressof(self.table), len(launches)
        self.work = sum(work for _, _, work in launches)


class Threads:
    """A number of threads, the caller's among them. One list of kernels runs at a time.

    `run` is what the caller does with a list, `work` what each further thread does until it is
    given the list at address 0; both belong to `owner`. That comes when nobody has the threads any
    more, or the process ends.
    """

    def __init__(
        self,
        count: int,
        run: Callable[[int, int, int, int], None],
        work: Callable[[int, int], None],
        owner: object = None,
    ) -> None:
        self.count, self._run = count, run
        self.shared = (ctypes.c_int64 * (WORKERS + count * WORKER))()
        self.lock = threading.Lock()
        self.address = address = ctypes.addressof(self.shared)
        library, workers = ctypes.CDLL(None), []
        for thread in range(1, count):
            semaphore = address + 8 * (WORKERS + (thread - 1) * WORKER + SEMAPHORE)
            library.sem_init(ctypes.c_void_p(semaphore), 0, 0)
            workers.append(threading.Thread(target=work, args=(address, thread), daemon=True))
            workers[-1].start()
        self._end = weakref.finalize(self, _end, run, self.shared, workers, self.lock, owner)

    def run(self, entries: Entries) -> None:
        """Run kernels in order; where they have little work in all, nobody is woken."""
        count = self.count if entries.work >= WORTH_WAKING else 1
        with self.lock:
            self._run(self.address, entries.address, entries.count, count)

    def forget(self) -> None:
        """Leave the threads alone: in the child of a fork there are none."""
        self._end.detach()


def _end(
    run: Callable[[int, int, int, int], None],
    shared: Any,
    workers: list[threading.Thread],
    lock: threading.Lock,
    owner: object,
) -> None:
    with lock:
        run(ctypes.addressof(shared), 0, 0, len(workers) + 1)
    for worker in workers:
        worker.join()
