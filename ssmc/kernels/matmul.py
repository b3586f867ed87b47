"""int8 matrix products of many rows, and what follows them on the accumulator.

One program makes one tile of the result, [block_m, block_n + extra_n]. Two parts side by side let a
tile be as wide as fills the processors evenly, since one part alone is a power of two: with 132
processors, 2048 x 2560 is 128 tiles of 128 x (256 + 64) but 160 of 128 x 256, two rounds.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels import matmul_hopper, matmul_persistent, matmul_shallow, matmul_split
from ssmc.kernels.arithmetic import inverse_of
from ssmc.kernels.launch import await_inputs, can_chain, launch, row_view
from ssmc.kernels.matmul_int4 import w4a8_product
from ssmc.kernels.tiles import (
    Tiling,
    load_tile,
    load_vector,
    loads,
    loop_clocks,
    meta,
    operands_of,
    processors,
    rescale,
    step,
    store_result,
    tile_of,
)

_SHAPES = (  # rows, columns in one part, columns in another
    *itertools.product((128,), ((256, 64), (256, 0), (128, 64), (128, 32), (128, 0), (64, 0))),
    *itertools.product((64,), ((128, 32), (128, 0), (64, 32), (64, 16), (64, 0), (32, 0))),
)


@functools.cache
def choose_tiling(m: int, n: int, k: int, count: int) -> Tiling:
    """The tiling of [m, k] by [n, k] that an estimate of its time on `count` processors favours.

    In clocks of one processor: its shared memory or its copies for each tile, and six elements of
    the result a clock, which programs that stay do while they multiply the next tile. Others take a
    second part of the columns, which costs a smaller instruction, only where all tiles then run at
    a time. The depth is divided where that is much better: its two kernels wait for memory twice.
    Fitted to an H100.
    """

    def cost(shape: tuple[int, tuple[int, int]]) -> float:
        height, parts = shape
        width = sum(parts)
        tiles = -(-m // height) * -(-n // width)
        loop, result = k * loop_clocks(height, parts), height * width / 6
        if _stays(height, width):
            return -(-tiles // count) * loop + result
        if parts[1] and tiles > count:
            return math.inf
        rounds: float = -(-tiles // count)
        # Small tiles share a processor, and fill much of what others leave of it.
        if rounds > 1 and height * width <= 64 * 64:
            rounds = tiles / count + 0.25
        return rounds * (loop + result)

    shape = min((shape for shape in _SHAPES if shape[0] < 2 * max(m, 33)), key=cost)
    divided = matmul_split.choose_split(m, n, k, count)
    if 1.5 * matmul_split.clocks(divided, m, n, k, count) + 600 < cost(shape):
        return divided
    height, (block_n, extra_n) = shape
    alone = -(-m // height) * -(-n // (block_n + extra_n)) <= count
    return _tiling(height, block_n, extra_n, k, alone)


def _stays(block_m: int, width: int) -> bool:
    """Whether such a tile is for the programs of `ssmc.kernels.matmul_persistent`."""
    return block_m == 128 and width > 128


def _tiling(block_m: int, block_n: int, extra_n: int, k: int, alone: bool) -> Tiling:
    """A tiling of that shape, its pipeline as deep as the shared memory of a processor allows.

    `alone` says that no processor has two such tiles to work on.
    """
    width = block_n + extra_n
    deep = k >= 1024 and block_m + width <= 160 and (alone or width <= 32)
    block_k = 256 if deep else 128 if k > 512 else 64
    large = block_m * width > 128 * 128
    square = block_m == width == 128 and k >= 2048  # long enough for loads that run far ahead
    room = 230_000 if large else 222_000 if alone else 113_000
    stays = _stays(block_m, width)
    limit = 9 if deep or alone or stays else 4
    return Tiling(
        block_m,
        block_n,
        extra_n,
        block_k,
        warps=8 if large or square or (alone and block_m == 128) else 4,
        stages=max(2, min(limit, room // ((block_m + width) * block_k), -(-k // block_k))),
        descriptors=True,
        asynchronous=alone or square or width <= 32,
        persistent=stays,
    )


def int8_linear(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    tiling: Tiling | None = None,
) -> Tensor:
    """`ssmc.ops.int8_linear` on a GPU."""
    y = torch.empty((*x_q.shape[:-1], w_q.shape[0]), dtype=torch.float32, device=x_q.device)
    _product(x_q, x_scale, w_q, w_scale, bias, None, None, y, tiling)
    return y


def int8_linear_add(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    tiling: Tiling | None = None,
) -> Tensor:
    """`ssmc.ops.int8_linear_add` on a GPU."""
    y = torch.empty(residual.shape, dtype=torch.float32, device=x_q.device)
    _product(x_q, x_scale, w_q, w_scale, bias, row_view(residual), None, y, tiling)
    return y


def int8_linear_quantize(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
    *,
    tiling: Tiling | None = None,
) -> Tensor:
    """`ssmc.ops.int8_linear_quantize` on a GPU."""
    y = torch.empty((*x_q.shape[:-1], w_q.shape[0]), dtype=torch.int8, device=x_q.device)
    _product(x_q, x_scale, w_q, w_scale, bias, None, out_scale.reshape(-1), y, tiling)
    return y


def _product(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    y: Tensor,
    tiling: Tiling | None,
) -> None:
    """Write the product, with what follows it, over y [..., N] (contiguous)."""
    if w_q.dtype == torch.uint8:
        w4a8_product(x_q, x_scale, w_q, w_scale, bias, residual, out_scale, y, tiling)
        return
    operands = operands_of(x_q, x_scale, w_q, w_scale, bias)
    m, n, k = operands.sizes
    count = processors(x_q.device)
    steps = {
        "X_STEP": step(operands.x_scale),
        "W_STEP": step(operands.w_scale),
        "OUT_STEP": 0 if out_scale is None else step(out_scale),
    }
    after = (operands.x_scale, operands.w_scale, operands.bias, residual, out_scale, y, m, n, k)
    residual_stride = 0 if residual is None else residual.stride(0)
    if tiling is None and k <= matmul_shallow.DEEPEST:
        grid, constants = matmul_shallow.shape(m, n, k, count)
        launch(
            matmul_shallow.shallow_kernel,
            grid,
            operands.x,
            operands.w,
            *after,
            operands.x.stride(0),
            residual_stride,
            **constants,
            **steps,
            device=x_q.device,
        )
        return
    how = tiling or choose_tiling(m, n, k, count)
    if how.shares > 1:
        sums = matmul_split.partial_sums(operands, how)
        matmul_split.finish(sums, *after[:6], residual_stride, steps, operands.small)
        return
    kernel = _linear_kernel
    matrices = loads(operands, how)
    constants = {**meta(operands, how), "SMALL": operands.small}
    grid = triton.cdiv(m, how.block_m) * triton.cdiv(n, how.width)
    hopper = operands.aligned and can_chain(x_q.device)
    last: tuple[int, ...] = (residual_stride,)
    if hopper and how.persistent and matmul_persistent.fits(how):
        kernel = matmul_persistent.linear_kernel
        matrices = matmul_hopper.descriptors(operands.x, operands.w, how)
        constants = matmul_persistent.constants(how, operands.small, k, bias, residual, out_scale)
        grid = min(grid, count)
    elif hopper and how.asynchronous and matmul_hopper.fits(how):
        kernel = matmul_hopper.linear_kernel
        matrices = matmul_hopper.descriptors(operands.x, operands.w, how)
        constants = matmul_hopper.constants(how, operands.small, residual)
        last = residual_stride, k
    launch(
        kernel, (grid,), *matrices, *after, *last, **constants, **steps, GROUP=how.group,
        device=x_q.device,
    )  # fmt: skip


@triton.jit
def _linear_kernel(
    x_source,
    w_source,
    extra_source,
    x_scale,
    w_scale,
    bias,
    residual,
    out_scale,
    y,
    M,
    N,
    K,
    residual_stride,
    x_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXTRA_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SMALL: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    X_STEP: tl.constexpr,
    W_STEP: tl.constexpr,
    OUT_STEP: tl.constexpr,
    GROUP: tl.constexpr,
    CHAIN: tl.constexpr,
):
    WIDTH: tl.constexpr = BLOCK_N + EXTRA_N
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, WIDTH), GROUP)
    first = tile_n * WIDTH
    second = first + BLOCK_N
    await_inputs(CHAIN)
    top = tile_m * BLOCK_M
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    if EXTRA_N > 0:
        extra_sums = tl.zeros((BLOCK_M, EXTRA_N), tl.int32)
    for k in range(0, K, BLOCK_K):
        x = load_tile(x_source, top, k, M, K, x_stride, BLOCK_M, BLOCK_K, EVEN_K, DESCRIPTORS)
        part = load_tile(w_source, first, k, N, K, K, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS)
        if EXTRA_N > 0:
            more = load_tile(
                extra_source, second, k, N, K, K, EXTRA_N, BLOCK_K, EVEN_K, DESCRIPTORS
            )
            extra_sums = tl.dot(x, tl.trans(more), extra_sums, out_dtype=tl.int32)
        sums = tl.dot(x, tl.trans(part), sums, out_dtype=tl.int32)
    row = top + tl.arange(0, BLOCK_M)
    column = first + tl.arange(0, BLOCK_N)
    _finish(
        sums, row, column, M, N, x_scale, w_scale, bias, residual, residual_stride, out_scale, y,
        X_STEP, W_STEP, OUT_STEP, SMALL,
    )  # fmt: skip
    if EXTRA_N > 0:
        column = second + tl.arange(0, EXTRA_N)
        _finish(
            extra_sums, row, column, M, N, x_scale, w_scale, bias, residual, residual_stride,
            out_scale, y, X_STEP, W_STEP, OUT_STEP, SMALL,
        )  # fmt: skip


@triton.jit
def _finish(
    sums, row, column, M, N, x_scale, w_scale, bias, residual, residual_stride, out_scale, y,
    X_STEP: tl.constexpr,
    W_STEP: tl.constexpr,
    OUT_STEP: tl.constexpr,
    SMALL: tl.constexpr,
):  # fmt: skip
    """Scale the sums, do what follows, and write the tile."""
    shift = None
    if bias is not None:
        shift = load_vector(bias, column, N, 1)
    inverse = None
    if out_scale is not None:
        inverse = inverse_of(load_vector(out_scale, column, N, OUT_STEP))
    x_factor = load_vector(x_scale, row, M, X_STEP)
    w_factor = load_vector(w_scale, column, N, W_STEP)
    value = rescale(sums, x_factor, w_factor, shift, SMALL)
    store_result(value, row, column, M, N, residual, residual_stride, inverse, y)
