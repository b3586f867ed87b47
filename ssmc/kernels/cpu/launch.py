"""How kernels are launched: at once, and while a tape records, onto that as well.

A kernel is a function of (arguments, thread, threads), all int64: the address of its arguments, and
which share of the work to do. Arguments are int64 words: addresses of tensors, numbers, and the
bits of float64.
"""

from __future__ import annotations

import functools
import math
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmc.kernels.cpu.kernel import Kernel, kernel
from ssmc.kernels.cpu.threads import threads
from ssmc.kernels.cpu.words import arguments_at, float32_at
from ssmc.native.threads import Entries

LARGE, ALIGNMENT = 2**19, 64  # bytes

_recording = threading.local()


class Tape:
    """What was launched, in order, to be run again on the same memory.

    Kernels that follow one another are one list, which runs without Python. What is plain torch is
    a call between two such lists.
    """

    def __init__(self) -> None:
        self.parts: list[list[Any] | Callable[[], object]] = []
        self.kept: list[Any] = []  # what the addresses on the tape belong to
        self.rooms: list[Tensor] = []  # memory that was made for results
        self.plain: list[str] = []  # what is called of torch
        self._lists: list[Entries | Callable[[], object]] = []

    def __enter__(self) -> Tape:
        _recording.tape = self
        return self

    def __exit__(self, *_: object) -> None:
        _recording.tape = None

    def add(self, entry: tuple[int, int, int], kept: Sequence[Any]) -> None:
        """A launch of a kernel, and what its addresses belong to, the kernel first."""
        if not self.parts or not isinstance(self.parts[-1], list):
            self.parts.append([])
        self.parts[-1].append(entry)  # type: ignore[union-attr]
        self.kept.append(kept)

    def call(self, function: Callable[[], object], name: str) -> None:
        """A call of plain torch, which writes where it has written."""
        self.parts.append(function)
        self.plain.append(name)

    def run(self) -> None:
        """Everything on the tape again."""
        if len(self._lists) != len(self.parts):
            self._lists = [Entries(p) if isinstance(p, list) else p for p in self.parts]
        pool = threads()
        for part in self._lists:
            if isinstance(part, Entries):
                pool.run(part)
            else:
                part()


def tape() -> Tape | None:
    """The tape that records this thread's launches."""
    return getattr(_recording, "tape", None)


def launch(kernel: Kernel, *arguments: Tensor | float | None, work: int) -> None:
    """Run a kernel. Tensors have to be contiguous where it does not take their strides.

    `work` is about how many numbers it handles, 0 where it cannot be shared: what is little one
    thread does, since the others would have to be waited for.
    """
    words = np.array([_word(argument) for argument in arguments], np.int64)
    entry = (kernel.address, words.ctypes.data, work)
    threads().run(Entries([entry]))
    recording = tape()
    if recording is not None:
        recording.add(entry, (kernel, words, *arguments))


def _word(argument: Tensor | float | None) -> int:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, float):
        return int(struct.unpack("q", struct.pack("d", argument))[0])
    return int(argument or 0)


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for a result.

    Large ones are aligned here: the C library cuts aligned memory out of larger pieces, finds no
    place for the next of the same size in what is freed of it, and lets the heap grow.
    """
    made, recording = _empty(shape, dtype), tape()
    if recording is not None:
        recording.rooms.append(made)
    return made


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE:
        return torch.empty(tuple(shape), dtype=dtype)
    room = torch.from_numpy(np.empty(size + ALIGNMENT, np.uint8))
    start = -room.data_ptr() % ALIGNMENT
    return room[start : start + size].view(dtype).view(tuple(shape))


def run_torch(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of plain torch; on a tape, each run writes it to where it was the first time."""
    result = function(*arguments)
    recording = tape()
    if recording is not None:
        named: Any = getattr(function, "func", function)  # of what has keyword arguments
        name = str(getattr(named, "__name__", named))
        recording.call(lambda: _overwrite(result, function(*arguments)), name)
    return result


def _overwrite(old: Any, new: Any) -> None:
    if isinstance(old, Tensor):
        old.copy_(new)
    elif isinstance(old, tuple | list):
        for one, other in zip(old, new, strict=True):
            _overwrite(one, other)


# -- operands ---------------------------------------------------------------------------------


@kernel()
def _repeat(arguments, thread, threads):
    one, count, out = arguments_at(arguments, 3)
    value, values = float32_at(one, 1)[0], float32_at(out, count)
    for i in range(count):
        values[i] = value


def contiguous(x: Tensor) -> Tensor:
    """x, or its copy without gaps."""
    return x if x.is_contiguous() else run_torch(Tensor.contiguous, x)


def rows(x: Tensor) -> tuple[Tensor, int, int]:
    """x [..., C] as rows that lie a fixed number of elements apart: (x, how many, how far)."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else contiguous(x)
    count, apart = 1, 0
    for extent, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if extent == 1:
            continue
        if count == 1:
            apart = stride
        elif stride != count * apart:
            return rows(contiguous(x))
        count *= extent
    return x, count, apart or x.shape[-1]


def vector(scale: Tensor | None, count: int) -> Tensor | None:
    """`count` numbers, from as many or from one for all."""
    if scale is None:
        return None
    if scale.numel() == count:
        return contiguous(scale)
    repeated = empty((count,))
    launch(_repeat, scale, count, repeated, work=0)
    return repeated


def widened(state: Tensor) -> Tensor:
    """A state in float32: itself, or its copy."""
    return state if state.dtype == torch.float32 else run_torch(Tensor.float, state)


def narrowed(new: Tensor, state: Tensor) -> Tensor:
    """A new state of float32 in the type of `state`."""
    if state.dtype == torch.float32:
        return new
    return run_torch(functools.partial(Tensor.to, dtype=state.dtype), new)
