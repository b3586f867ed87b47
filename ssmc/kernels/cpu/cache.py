"""A token's rows in the caches of its keys and values, and the count of tokens."""

from __future__ import annotations

from torch import Tensor

from ssmc import ops
from ssmc.kernels.cpu.launch import contiguous, kernel, launch, run_torch
from ssmc.kernels.cpu.words import arguments_at, int8_at, int64_at, share
from ssmc.ops.attention import check_room


@kernel()
def _append(arguments, thread, threads):
    cache, x, position, batch, room, size = arguments_at(arguments, 6)
    places = int64_at(position, batch)
    for sequence in share(batch, thread, threads):
        place = places[sequence]
        if place < room:  # on a tape nobody looks at positions
            row = int8_at(cache + (sequence * room + place) * size, size)
            values = int8_at(x + sequence * size, size)
            for i in range(size):
                row[i] = values[i]


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
