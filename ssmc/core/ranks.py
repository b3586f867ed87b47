"""The processes of one compilation or evaluation, which share its batches.

Everything is computed as one process would compute it: what each adds is added in the order of the
batches, so that results have the same bits however many there are.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch import distributed as dist

from ssmc.core.saved import Saved, apart
from ssmc.errors import RankError

T = TypeVar("T")
_TOLD = "ssmc-told"
_ABOUT = "."  # no name of a tensor
_PATIENCE = timedelta(days=1)  # who has less to do waits for the others


class Ranks:
    """This process, `number` of `count`: alone, and so without anyone to talk to."""

    number, count = 0, 1

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of what all share: neighbours, as many as others have."""
        first, end = (len(items) * n // self.count for n in (self.number, self.number + 1))
        return items[first:end]

    def deal(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part, dealt like cards: of sorted items, large and small ones alike."""
        return items[self.number :: self.count]

    def gather(self, part: Saved) -> list[Saved]:
        """What each process gives, in their order, on the host."""
        return [part]

    def map(self, work: Callable[[T], Saved], items: Sequence[T]) -> list[Saved]:
        """What `work` gives for each item, in their order: each process works on its own part.

        What comes from others is on the host, and contiguous.
        """
        return [work(item) for item in items]

    def agree(self, value: bool) -> bool:
        """What the first process says."""
        return value

    def add_up(self, total: Tensor, terms: Sequence[Tensor]) -> Tensor:
        """`total`, and the terms of all processes added to it in order, in place.

        Those of the first, `number` 0, may be in it already. Terms may be on the host.
        """
        for term in terms:
            total += term.to(total.device, non_blocking=True)
        return total

    def is_first_to_tell(self) -> bool:
        """Whether no other process has said why the run ends."""
        return True


class Group(Ranks):
    """One of the processes that torch.distributed connects.

    RankError where another one has ended.
    """

    def __init__(self) -> None:
        self.number, self.count = dist.get_rank(), dist.get_world_size()

    def gather(self, part: Saved) -> list[Saved]:
        """What each process gives: as bytes, since shapes differ."""
        about = _bytes(json.dumps(part.about).encode())
        data = _bytes(save(apart(part.tensors) | {_ABOUT: about}))
        with _told():
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
            dist.all_gather(sizes, torch.tensor([len(data)]))
            longest = int(torch.stack(sizes).max())
            rows = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.count)]
            dist.all_gather(rows, torch.nn.functional.pad(data, (0, longest - len(data))))
        return [_parsed(row[: int(size)]) for row, size in zip(rows, sizes, strict=True)]

    def map(self, work: Callable[[T], Saved], items: Sequence[T]) -> list[Saved]:
        """What `work` gives for each item: one's own goes the same way as that of others."""
        done = [work(item) for item in self.own(items)]
        tensors = {
            f"{i} {name}": t for i, one in enumerate(done) for name, t in one.tensors.items()
        }
        found = []
        for part in self.gather(Saved({"each": [one.about for one in done]}, tensors)):
            ones = [Saved(about, {}) for about in part.about["each"]]
            for key, tensor in part.tensors.items():
                number, _, name = key.partition(" ")
                ones[int(number)].tensors[name] = tensor
            found += ones
        return found

    def agree(self, value: bool) -> bool:
        """What the first process says."""
        said = torch.tensor([value])
        with _told():
            dist.broadcast(said, 0)
        return bool(said)

    def add_up(self, total: Tensor, terms: Sequence[Tensor]) -> Tensor:
        """From process to process: each adds its terms to what those before it have."""
        with _told():
            if self.number:
                dist.recv(total, self.number - 1)
            super().add_up(total, terms)
            if self.number + 1 < self.count:
                dist.send(total, self.number + 1)
            dist.broadcast(total, self.count - 1)
        return total

    def is_first_to_tell(self) -> bool:
        """Asked of the store by which the processes found each other."""
        try:
            return dist.distributed_c10d._get_default_store().add(_TOLD, 1) == 1
        except Exception:  # it went with the process that kept it
            return True


def _bytes(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _parsed(raw: Tensor) -> Saved:
    tensors = load(raw.numpy().tobytes())
    return Saved(json.loads(tensors.pop(_ABOUT).numpy().tobytes()), tensors)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise _ended() from error


def find_ranks() -> Ranks:
    """The processes that torch.distributed knows, where it is in use; else this one."""
    return Group() if dist.is_available() and dist.is_initialized() else Ranks()


def join() -> Ranks:
    """The processes that torchrun started, now connected: by gloo, and NCCL between GPUs.

    Each has its share of the host's processors, unless OMP_NUM_THREADS gives it several: torchrun
    itself leaves it one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
        if beside and torch.get_num_threads() == 1:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // beside))
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(
                int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
            )
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=_PATIENCE)
        signal.signal(signal.SIGTERM, _end)  # which torchrun sends when one process has ended
    return find_ranks()


def leave() -> None:
    """Disconnect from the others, whose own work may go on."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _end(*_: object) -> None:
    raise _ended()


def _ended() -> RankError:
    return RankError(
        "another process of this run has ended",
        hint="the report of torchrun says which, and how",
    )
