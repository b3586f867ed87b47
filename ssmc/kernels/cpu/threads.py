"""Threads that run a list of kernels together: all threads do a share of each, then wait.

Numba's functions run without Python's lock. A thread that has nothing to do looks for work a while,
then sleeps on a semaphore.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import numpy as np
import torch
from numba import njit, types

from ssmc.kernels.cpu.words import (
    atomic_add,
    atomic_load,
    atomic_swap,
    call_at,
    int64_at,
)

SPINS = 4000  # looks for work before a thread sleeps: some 50 us
WORTH_SHARING, WORTH_WAKING = 2**13, 2**18  # numbers to handle: some 1 and 30 us of one thread
PATIENCE = 20000  # looks at a barrier before a thread lets others run

_sem_wait = types.ExternalFunction("sem_wait", types.int32(types.int64))
_sem_post = types.ExternalFunction("sem_post", types.int32(types.int64))
_sem_init = types.ExternalFunction("sem_init", types.int32(types.int64, types.int32, types.int32))
_sched_yield = types.ExternalFunction("sched_yield", types.int32())

# What threads share: int64 words, each on a cache line of its own.
LINE = 8
ARRIVED, PHASE, JOB, ENTRIES, COUNT, THREADS, WORKERS = (LINE * i for i in range(7))
ASLEEP, SEMAPHORE, WORKER = 0, LINE, 2 * LINE  # of a worker, from WORKERS on


@njit
def _wait_for_all(shared, threads):
    phase = atomic_load(shared + 8 * PHASE)
    if atomic_add(shared + 8 * ARRIVED, 1) == threads - 1:
        atomic_swap(shared + 8 * ARRIVED, 0)
        atomic_add(shared + 8 * PHASE, 1)
        return
    looks = 0
    while atomic_load(shared + 8 * PHASE) == phase:
        looks += 1
        if looks > PATIENCE:
            _sched_yield()


@njit
def _run_share(shared, entries, count, thread, threads):
    """Entries with little work are the first thread's; a run of them is waited for once."""
    table, alone = int64_at(entries, 3 * count), False
    for i in range(count):
        function, arguments, work = table[3 * i], table[3 * i + 1], table[3 * i + 2]
        if work < WORTH_SHARING:
            alone = True
            if thread == 0:
                call_at(function, arguments, 0, 1)
            continue
        if alone and threads > 1:
            _wait_for_all(shared, threads)
        alone = False
        call_at(function, arguments, thread, threads)
        if threads > 1:
            _wait_for_all(shared, threads)
    if alone and threads > 1:
        _wait_for_all(shared, threads)


_RUN = types.void(*[types.int64] * 4)
_WORK = types.void(*[types.int64] * 2)


@njit(_RUN, nogil=True, cache=True)
def _run(shared, entries, count, threads):
    """The first thread: give the others their work, and do a share."""
    if threads > 1:
        words = int64_at(shared, WORKERS)
        words[ENTRIES], words[COUNT], words[THREADS] = entries, count, threads
        atomic_add(shared + 8 * JOB, 1)
        for thread in range(1, threads):
            worker = shared + 8 * (WORKERS + (thread - 1) * WORKER)
            if atomic_swap(worker + 8 * ASLEEP, 0) == 1:
                _sem_post(worker + 8 * SEMAPHORE)
    _run_share(shared, entries, count, 0, threads)


@njit(_WORK, nogil=True, cache=True)
def _work(shared, thread):
    """A further thread, for as long as the process lasts; JOB counts what it has been given."""
    worker = shared + 8 * (WORKERS + (thread - 1) * WORKER)
    words = int64_at(shared, WORKERS)
    done = 0
    while True:
        looks = 0
        while atomic_load(shared + 8 * JOB) == done:
            looks += 1
            if looks > SPINS:
                atomic_swap(worker + 8 * ASLEEP, 1)
                if atomic_load(shared + 8 * JOB) == done or (
                    atomic_swap(worker + 8 * ASLEEP, 0) == 0
                ):
                    while _sem_wait(worker + 8 * SEMAPHORE) != 0:
                        pass
                looks = 0
        done += 1
        _run_share(shared, words[ENTRIES], words[COUNT], thread, words[THREADS])


@njit(types.void(types.int64), cache=True)
def _make_semaphore(address):
    _sem_init(address, 0, 0)


class Entries:
    """Launches of kernels in order.

    Each is three int64: a kernel's address, that of its arguments, and its work, in numbers it
    handles.
    """

    def __init__(self, launches: Sequence[tuple[int, int, int]]) -> None:
        self.table = np.array(launches, np.int64)
        self.address, self.count = self.table.ctypes.data, len(launches)
        self.work = sum(work for _, _, work in launches)


class Threads:
    """A number of threads, the caller's among them. One list of kernels runs at a time."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.shared = np.zeros(WORKERS + count * WORKER, np.int64)
        self.lock = threading.Lock()
        self.address = address = self.shared.ctypes.data
        for thread in range(1, count):
            _make_semaphore(address + 8 * (WORKERS + (thread - 1) * WORKER + SEMAPHORE))
            threading.Thread(target=_work, args=(address, thread), daemon=True).start()

    def run(self, entries: Entries) -> None:
        """Run kernels in order; where they have little work in all, nobody is woken."""
        count = self.count if entries.work >= WORTH_WAKING else 1
        with self.lock:
            _run(self.address, entries.address, entries.count, count)


_pools: dict[int, Threads] = {}


def threads() -> Threads:
    """As many threads as torch has (`torch.set_num_threads`)."""
    count = torch.get_num_threads()
    if count not in _pools:
        _pools[count] = Threads(count)
    return _pools[count]


os.register_at_fork(after_in_child=_pools.clear)  # a child has none of its parent's threads
