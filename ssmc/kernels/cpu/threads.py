"""What the threads of `ssmc.native.threads` run, compiled.

A thread that has nothing to do looks for work a while, then sleeps on a semaphore.
"""

from __future__ import annotations

import os

import torch
from numba import njit, types

from ssmc.kernels.cpu.kernel import Kernel
from ssmc.kernels.cpu.words import (
    atomic_add,
    atomic_load,
    atomic_swap,
    call_at,
    int64_at,
)
from ssmc.native.threads import (
    ARRIVED,
    ASLEEP,
    COUNT,
    ENTRIES,
    JOB,
    PHASE,
    SEMAPHORE,
    THREADS,
    WORKER,
    WORKERS,
    Threads,
)

SPINS = 4000  # looks for work before a thread sleeps: some 50 us
WORTH_SHARING = 2**13  # numbers to handle: some 1 us
PATIENCE = 20000  # looks at a barrier before a thread lets others run

_sem_wait = types.ExternalFunction("sem_wait", types.int32(types.int64))
_sem_post = types.ExternalFunction("sem_post", types.int32(types.int64))
_sched_yield = types.ExternalFunction("sched_yield", types.int32())


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


def _work(shared, thread):
    """A further thread, until it is given no list; JOB counts what it has been given."""
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
        if words[ENTRIES] == 0:
            return
        _run_share(shared, words[ENTRIES], words[COUNT], thread, words[THREADS])


RUN = Kernel(_run, set(), words=4)
WORK = Kernel(_work, set(), words=2)

_pools: dict[int, Threads] = {}


def threads() -> Threads:
    """As many threads as torch has (`torch.set_num_threads`)."""
    count = torch.get_num_threads()
    if count not in _pools:
        _pools[count] = Threads(count, RUN.call, WORK.call)
    return _pools[count]


def _forget() -> None:
    for pool in _pools.values():
        pool.forget()
    _pools.clear()


os.register_at_fork(after_in_child=_forget)  # a child has none of its parent's threads
