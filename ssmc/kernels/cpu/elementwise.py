"""What is done to each number: sums, copies, other types; and which is the largest."""

from __future__ import annotations

import functools
import operator
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ssmc.kernels.cpu.kernel import kernel
from ssmc.kernels.cpu.launch import contiguous, empty, launch, run_torch
from ssmc.kernels.cpu.words import (
    arguments_at,
    float32_at,
    int8_at,
    int16_at,
    int32_at,
    int64_at,
    share,
)


@kernel()
def _count(arguments, thread, threads):
    counts, size, more, out = arguments_at(arguments, 4)
    before, after = int64_at(counts, size), int64_at(out, size)
    for i in share(size, thread, threads):
        after[i] = before[i] + more


def add(x: Any, y: Any) -> Any:
    """x + y; compiled where a number is added to counts, as to the position in a sequence."""
    counts = isinstance(x, Tensor) and x.dtype == torch.int64 and x.is_contiguous()
    if not counts or not isinstance(y, int):
        return run_torch(operator.add, x, y)
    out = empty(x.shape, x.dtype)
    launch(_count, x, x.numel(), y, out, work=0)
    return out


@kernel()
def _widen(arguments, thread, threads):
    x, count, out = arguments_at(arguments, 3)
    part = share(count, thread, threads)
    bits, wide = int16_at(x, count), int32_at(out, count)
    for i in part:
        wide[i] = np.int32(bits[i]) << 16


@kernel()
def _narrow(arguments, thread, threads):
    x, count, out = arguments_at(arguments, 3)
    part = share(count, thread, threads)
    bits, narrow = int32_at(x, count), int16_at(out, count)
    for i in part:
        word = np.int64(np.uint32(bits[i]))
        if word & 0x7FFFFFFF > 0x7F800000:  # no number, and to stay none
            narrow[i] = np.int16(word >> 16 | 0x40)
        else:  # half to even
            narrow[i] = np.int16((word + 0x7FFF + (word >> 16 & 1)) >> 16)


_CONVERSIONS = {
    (torch.bfloat16, torch.float32): _widen,
    (torch.float32, torch.bfloat16): _narrow,
}


def to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in another type; compiled between float32 and bfloat16, rounded half to even."""
    if x.dtype == dtype:
        return x
    conversion = _CONVERSIONS.get((x.dtype, dtype))
    if conversion is None:
        return run_torch(functools.partial(Tensor.to, dtype=dtype), x)
    x = contiguous(x)
    out = empty(x.shape, dtype)
    launch(conversion, x, x.numel(), out, work=x.numel())
    return out


@kernel()
def _copy(arguments, thread, threads):
    source, count, out = arguments_at(arguments, 3)
    part = share(count, thread, threads)
    values, copied = int8_at(source, count), int8_at(out, count)
    for i in part:
        copied[i] = values[i]


def copy_into(out: Tensor, x: Tensor) -> None:
    """Write `x` over `out`, both alike."""
    if out.dtype != x.dtype or not out.is_contiguous() or not x.is_contiguous():
        run_torch(out.copy_, x)
    else:
        count = x.numel() * x.element_size()
        launch(_copy, x, count, out, work=count // 4)


@njit
def _largest(values):
    largest = values[0]
    for i in range(1, len(values)):
        largest = max(largest, values[i])
    return largest


@kernel("nnan", "nsz", "reassoc")
def _argmax(arguments, thread, threads):
    x, count, length, out = arguments_at(arguments, 4)
    found = int64_at(out, count)
    for row in share(count, thread, threads):
        values = float32_at(x + 4 * row * length, length)
        largest, place = _largest(values), 0
        while place < length - 1 and values[place] != largest:
            place += 1
        found[row] = place


def argmax(x: Tensor) -> Tensor:
    """Where the largest of each row of x [rows, length], float32, is for the first time, int64."""
    out = empty((len(x),), torch.int64)
    launch(_argmax, x, len(x), x.shape[1], out, work=0)
    return out
