"""A token's rows in the caches of its keys and values, and the count of tokens."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ssmc import ops
from ssmc.kernels.cpu.kernel import kernel
from ssmc.kernels.cpu.launch import contiguous, empty, launch, run_torch
from ssmc.kernels.cpu.quantize import quantize_row
from ssmc.kernels.cpu.words import (
    arguments_at,
    bits_of_float32,
    float32_at,
    int8_at,
    int16_at,
    int64_at,
    share,
)
from ssmc.ops.attention import check_room

ROWS = 64  # at a time


@njit
def _copy(source, count, out):
    values, copied = int8_at(source, count), int8_at(out, count)
    for i in range(count):
        copied[i] = values[i]


@kernel()
def _append(arguments, thread, threads):
    cache, x, position, batch, room, size = arguments_at(arguments, 6)
    places = int64_at(position, batch)
    for sequence in share(batch, thread, threads):
        place = places[sequence]
        if place < room:  # on a tape nobody looks at positions
            _copy(x + sequence * size, size, cache + (sequence * room + place) * size)


@kernel()
def _append_copy(arguments, thread, threads):
    cache, x, position, batch, room, length, size, out = arguments_at(arguments, 8)
    places, blocks = int64_at(position, batch), (room + ROWS - 1) // ROWS
    for unit in share(batch * blocks, thread, threads):
        sequence, first = unit // blocks, unit % blocks * ROWS
        last, place = min(room, first + ROWS), places[sequence]
        begin, end = min(max(place, first), last), max(min(place + length, last), first)
        old, new = cache + sequence * room * size, out + sequence * room * size
        _copy(old + first * size, (begin - first) * size, new + first * size)
        if begin < end:
            given = x + (sequence * length + begin - place) * size
            _copy(given, (end - begin) * size, new + begin * size)
        behind = max(begin, end)
        _copy(old + behind * size, (last - behind) * size, new + behind * size)


def cache_append(cache: Tensor, x: Tensor, position: Tensor) -> Tensor:
    """As ssmc::cache_append."""
    if x.dtype != cache.dtype or x.shape[2:] != cache.shape[2:]:
        return run_torch(ops.cache_append, cache, x, position)
    check_room(cache, x, position)
    old, out = contiguous(cache), empty(cache.shape, cache.dtype)
    launch(
        _append_copy, old, contiguous(x), contiguous(position), len(cache), cache.shape[1],
        x.shape[1], cache[0, 0].numel() * cache.element_size(), out, work=cache.numel(),
    )  # fmt: skip
    return out


def cache_append_step(cache: Tensor, x: Tensor, position: Tensor) -> Tensor:
    """As ssmc::cache_append_step; the row is written into `cache` itself."""
    if x.dtype != cache.dtype or not cache.is_contiguous() or x.shape[1] != 1:
        return run_torch(ops.cache_append_step, cache, x, position)
    check_room(cache, x, position)
    row = contiguous(x)
    launch(
        _append, cache, row, contiguous(position), len(cache), cache.shape[1],
        row[0].numel() * row.element_size(), work=row.numel() if len(cache) > 1 else 0,
    )  # fmt: skip
    return cache


@kernel()
def _append_rounded(arguments, thread, threads):
    cache, scales, wide, x, position, batch, room, groups, n = arguments_at(arguments, 9)
    places = int64_at(position, batch)
    for unit in share(batch * groups, thread, threads):
        sequence, place = unit // groups, places[unit // groups]
        if place < room:
            row = (sequence * room + place) * groups + unit % groups
            scale = quantize_row(float32_at(x + 4 * unit * n, n), int8_at(cache + row * n, n))
            if wide:
                float32_at(scales + 4 * row, 1)[0] = scale
            else:  # it is a bfloat16
                int16_at(scales + 2 * row, 1)[0] = np.int16(bits_of_float32(scale) >> 16)


def cache_quantize_step(
    cache: Tensor, scales: Tensor, x: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """As ssmc::cache_quantize_step; the rows are written into `cache` and `scales` themselves."""
    known = scales.dtype in (torch.float32, torch.bfloat16) and scales.shape[2:] == (x.shape[2], 1)
    whole = cache.is_contiguous() and scales.is_contiguous()
    if not known or not whole or x.shape[1:] != (1, *cache.shape[2:]):
        return run_torch(ops.cache_quantize_step, cache, scales, x, position)
    check_room(cache, x, position)
    batch, room, groups, n = cache.shape
    launch(
        _append_rounded, cache, scales, int(scales.dtype == torch.float32), contiguous(x),
        contiguous(position), batch, room, groups, n, work=x.numel() if batch > 1 else 0,
    )  # fmt: skip
    return cache, scales


@kernel()
def _count(arguments, thread, threads):
    position, batch, tokens = arguments_at(arguments, 3)
    counts = int64_at(position, batch)
    for sequence in share(batch, thread, threads):
        counts[sequence] += tokens


def position_step(position: Tensor, tokens: int) -> Tensor:
    """As ssmc::position_step; the new count is written over `position`."""
    if not position.is_contiguous():
        return run_torch(ops.position_step, position, tokens)
    launch(_count, position, len(position), tokens, work=0)
    return position
