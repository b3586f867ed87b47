"""Rows put into a cache where it lies, in place of a copy of all of it."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels.launch import await_inputs, launch

BLOCK = 1024


def cache_append(cache: Tensor, x: Tensor, position: Tensor) -> Tensor:
    """`ssmc.ops.cache_append` on a GPU: a copy of the cache."""
    return cache_append_step(cache.clone(), x, position)


def cache_append_step(cache: Tensor, x: Tensor, position: Tensor) -> Tensor:
    """`ssmc.ops.cache_append_step` on a GPU: the cache itself."""
    batch, length = x.shape[:2]
    width = math.prod(x.shape[2:])
    grid = (batch * length, -(-width // BLOCK))
    launch(
        append_kernel, grid, cache, x.contiguous(), position, length, cache.shape[1], width,
        BLOCK=BLOCK, device=x.device, num_warps=4,
    )  # fmt: skip
    return cache


@triton.jit
def append_kernel(cache, x, position, L, T, C, BLOCK: tl.constexpr, CHAIN: tl.constexpr):
    """One row of one sequence."""
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    await_inputs(CHAIN)
    b = row // L
    t = tl.load(position + b) + row % L
    mask = (c < C) & (t < T)
    tl.store(cache + (b * T + t) * C + c, tl.load(x + row * C + c, mask=c < C), mask=mask)
