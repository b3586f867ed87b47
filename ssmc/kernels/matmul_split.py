"""An int8 product whose depth is divided among programs, and one of quantised segments.

Where the result is narrow and deep, a program for each tile of it would leave most processors idle.
So the depth too is divided; a second kernel adds what the programs summed, which for integers is
exact in any order, and does what follows. It may quantise segments of the columns with a scale a
row each, which needs whole rows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels import matmul_hopper
from ssmc.kernels.arithmetic import inverse_of, scale_for, to_int8
from ssmc.kernels.launch import await_inputs, can_chain, launch, let_next_load
from ssmc.kernels.matmul_int4 import w4a8_product
from ssmc.kernels.tiles import (
    Operands,
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
)


def int8_linear_split(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    *,
    tiling: Tiling | None = None,
    shares: int | None = None,
) -> list[Tensor]:
    """`ssmc.ops.int8_linear_split` on a GPU; the depth is divided into `shares`."""
    n = w_q.shape[0]
    shape, device = x_q.shape[:-1], x_q.device
    q = torch.empty((*shape, n), dtype=torch.int8, device=device)
    scales = torch.empty((*shape, len(sizes)), dtype=torch.float32, device=device)
    if w_q.dtype == torch.int8:
        operands = operands_of(x_q, x_scale, w_q, w_scale, bias)
        how = tiling or choose_split(*operands.sizes, processors(device))
        sums = partial_sums(operands, replace(how, shares=shares or how.shares))
        _quantize_segments(sums, operands, q, scales, tuple(sizes))
    else:
        y = torch.empty((*shape, n), dtype=torch.float32, device=device)
        w4a8_product(x_q, x_scale, w_q, w_scale, bias, None, None, y, None)
        _quantize_segments(y.view(1, -1, n), None, q, scales, tuple(sizes))
    parts = zip(q.split(list(sizes), -1), scales.split(1, -1), strict=True)
    return [tensor for part in parts for tensor in part]


_WIDTHS = ((128, 64), (128, 0), (64, 32), (64, 0), (32, 0))


@functools.cache
def choose_split(m: int, n: int, k: int, count: int) -> Tiling:
    """The tiling, with the number of shares of the depth, that `clocks` favours."""
    tilings = (
        _tiling(parts, k, shares)
        for parts, shares in itertools.product(_WIDTHS, (1, 2, 3, 4, 5, 6, 8, 10, 12, 16))
    )
    return min(tilings, key=lambda how: clocks(how, m, n, k, count))


def _tiling(parts: tuple[int, int], k: int, shares: int) -> Tiling:
    blocks = max(1, -(-k // (shares * 128)))
    stages = max(2, min(5, blocks, 113_000 // ((64 + sum(parts)) * 128)))
    return Tiling(
        64, *parts, 128, stages=stages, descriptors=True, asynchronous=True, shares=shares
    )


def clocks(how: Tiling, m: int, n: int, k: int, count: int) -> float:
    """The estimated time of both kernels in clocks of one of `count` processors.

    That of the tiles, of which two share a processor, and for each share the sums, written and read
    again, of which all processors together move 1500 bytes a clock. Fitted to an H100.
    """
    programs = -(-m // how.block_m) * -(-n // how.width) * how.shares
    depth = -(-k // (how.shares * how.block_k)) * how.block_k
    loop = depth * loop_clocks(how.block_m, (how.block_n, how.extra_n))
    return max(1.0, programs / count) * loop + how.shares * (100 + m * n * 8 / 1500)


def partial_sums(operands: Operands, how: Tiling) -> Tensor:
    """The product in int32 [shares, M, N], each of a part of the depth."""
    m, n, k = operands.sizes
    device = operands.x.device
    # A share is a whole number of blocks, and none is empty.
    depth = triton.cdiv(k, how.shares * how.block_k) * how.block_k
    shares = triton.cdiv(k, depth)
    sums = torch.empty((shares, m, n), dtype=torch.int32, device=device)
    tiles = triton.cdiv(m, how.block_m), triton.cdiv(n, how.width)
    if how.asynchronous and matmul_hopper.fits(how) and operands.aligned and can_chain(device):
        launch(
            matmul_hopper.linear_kernel, (tiles[0] * tiles[1], shares),
            *matmul_hopper.descriptors(operands.x, operands.w, how),
            None, None, None, None, None, sums, m, n, k, 0, depth,
            **matmul_hopper.constants(how, False, None), X_STEP=0, W_STEP=0, OUT_STEP=0,
            GROUP=how.group, device=device,
        )  # fmt: skip
    else:
        launch(
            _partial_kernel, (*tiles, shares), *loads(operands, how), sums, m, n, k, depth,
            **meta(operands, how), device=device,
        )  # fmt: skip
    return sums


def finish(
    sums: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    y: Tensor,
    residual_stride: int,
    steps: dict[str, int],
    small: bool,
) -> None:
    """Add up sums [shares, M, N], and write over y [..., N] what follows them."""
    shares, m, n = sums.shape
    rows = 4 if m * n < 1 << 20 else 16
    launch(
        _sum_kernel,
        (triton.cdiv(m, rows), triton.cdiv(n, 64)),
        sums,
        x_scale,
        w_scale,
        bias,
        residual,
        out_scale,
        y,
        m,
        n,
        residual_stride,
        SHARES=shares,
        SMALL=small,
        **steps,
        BLOCK_M=rows,
        BLOCK_N=64,
        num_warps=2 if rows == 4 else 4,
        device=sums.device,
    )


def _quantize_segments(
    sums: Tensor, operands: Operands | None, q: Tensor, scales: Tensor, sizes: tuple[int, ...]
) -> None:
    """Add up sums [shares, M, N], scale them, and quantise their segments into q and scales.

    Without operands, sums are a result in float32 [1, M, N].
    """
    shares, m, n = sums.shape
    width = triton.next_power_of_2(n)
    rows = max(1, min(4, 1024 // width, m // (2 * processors(q.device))))
    rows = triton.next_power_of_2(rows + 1) // 2
    launch(
        _segments_kernel,
        (triton.cdiv(m, rows),),
        sums,
        None if operands is None else operands.x_scale,
        None if operands is None else operands.w_scale,
        None if operands is None else operands.bias,
        q,
        scales,
        m,
        n,
        BOUNDS=(0, *itertools.accumulate(sizes)),
        SHARES=shares,
        SMALL=operands is not None and operands.small,
        X_STEP=0 if operands is None else step(operands.x_scale),
        W_STEP=0 if operands is None else step(operands.w_scale),
        BLOCK_M=rows,
        WIDTH=width,
        num_warps=4 if rows * width >= 512 else 2,
        device=q.device,
    )


@triton.jit
def _partial_kernel(
    x_source,
    w_source,
    extra_source,
    sums,
    M,
    N,
    K,
    depth,
    x_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXTRA_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    CHAIN: tl.constexpr,
):
    await_inputs(CHAIN)
    top = tl.program_id(0) * BLOCK_M
    first = tl.program_id(1) * (BLOCK_N + EXTRA_N)
    second = first + BLOCK_N
    begin = tl.program_id(2) * depth
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    if EXTRA_N > 0:
        extra_total = tl.zeros((BLOCK_M, EXTRA_N), tl.int32)
    for k in range(begin, tl.minimum(begin + depth, K), BLOCK_K):
        x = load_tile(x_source, top, k, M, K, x_stride, BLOCK_M, BLOCK_K, EVEN_K, DESCRIPTORS)
        part = load_tile(w_source, first, k, N, K, K, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS)
        if EXTRA_N > 0:
            more = load_tile(
                extra_source, second, k, N, K, K, EXTRA_N, BLOCK_K, EVEN_K, DESCRIPTORS
            )
            extra_total = tl.dot(x, tl.trans(more), extra_total, out_dtype=tl.int32)
        total = tl.dot(x, tl.trans(part), total, out_dtype=tl.int32)
    row = top + tl.arange(0, BLOCK_M)
    line = sums + (tl.program_id(2).to(tl.int64) * M + row[:, None]) * N
    column = first + tl.arange(0, BLOCK_N)
    tl.store(line + column[None, :], total, mask=(row < M)[:, None] & (column < N)[None, :])
    if EXTRA_N > 0:
        column = second + tl.arange(0, EXTRA_N)
        inside = (row < M)[:, None] & (column < N)[None, :]
        tl.store(line + column[None, :], extra_total, mask=inside)


@triton.jit
def _sum_kernel(
    sums,
    x_scale,
    w_scale,
    bias,
    residual,
    out_scale,
    y,
    M,
    N,
    residual_stride,
    SHARES: tl.constexpr,
    SMALL: tl.constexpr,
    X_STEP: tl.constexpr,
    W_STEP: tl.constexpr,
    OUT_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHAIN: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < M)[:, None] & (column < N)[None, :]
    at = row.to(tl.int64)[:, None] * N + column[None, :]
    shift = None
    if bias is not None:
        shift = load_vector(bias, column, N, 1)
    inverse = None
    if out_scale is not None:
        inverse = inverse_of(load_vector(out_scale, column, N, OUT_STEP))
    w_factor = load_vector(w_scale, column, N, W_STEP)
    await_inputs(CHAIN)
    x_factor = load_vector(x_scale, row, M, X_STEP)
    stride = (tl.full((), 0, tl.int64) + M) * N
    total = tl.load(sums + at, mask=inside, other=0)
    for i in tl.static_range(1, SHARES):
        total += tl.load(sums + at + stride * i, mask=inside, other=0)
    value = rescale(total, x_factor, w_factor, shift, SMALL)
    store_result(value, row, column, M, N, residual, residual_stride, inverse, y)


@triton.jit
def _segments_kernel(
    sums,
    x_scale,
    w_scale,
    bias,
    q,
    scales,
    M,
    N,
    BOUNDS: tl.constexpr,
    SHARES: tl.constexpr,
    SMALL: tl.constexpr,
    X_STEP: tl.constexpr,
    W_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    CHAIN: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, WIDTH)
    inside = (row < M)[:, None] & (column < N)[None, :]
    at = row.to(tl.int64)[:, None] * N + column[None, :]
    shift = None
    if bias is not None:
        shift = load_vector(bias, column, N, 1)
    if w_scale is not None:
        w_factor = load_vector(w_scale, column, N, W_STEP)
    let_next_load(CHAIN)
    await_inputs(CHAIN)
    if x_scale is not None:
        x_factor = load_vector(x_scale, row, M, X_STEP)
    stride = (tl.full((), 0, tl.int64) + M) * N
    value = tl.load(sums + at, mask=inside, other=0)
    for i in tl.static_range(1, SHARES):
        value += tl.load(sums + at + stride * i, mask=inside, other=0)
    if w_scale is not None:
        value = rescale(value, x_factor, w_factor, shift, SMALL)
    inverse = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    SEGMENTS: tl.constexpr = len(BOUNDS) - 1
    for i in tl.static_range(SEGMENTS):
        segment = (column >= BOUNDS[i]) & (column < BOUNDS[i + 1])
        scale = scale_for(tl.max(tl.where(segment[None, :], tl.abs(value), 0.0), 1))
        tl.store(scales + row * SEGMENTS + i, scale, mask=row < M)
        inverse = tl.where(segment[None, :], inverse_of(scale)[:, None], inverse)
    tl.store(q + at, to_int8(value, inverse), mask=inside)
