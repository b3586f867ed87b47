"""An int8 product whose columns fall into segments, each quantised with a scale a row.

A scale needs a whole row of a result that is narrow and deep: one program a few rows would leave
most processors idle. So the depth too is divided among programs; a second kernel adds what they
summed, which for integers is exact in any order, and quantises.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels.arithmetic import inverse_of, scale_for, to_int8
from ssmc.kernels.launch import await_inputs, launch
from ssmc.kernels.matmul import Operands, int8_linear, loads, meta, operands_of
from ssmc.kernels.tiles import (
    Tiling,
    load_tile,
    load_vector,
    processors,
    rescale,
    step,
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
        sums = _partial_sums(operands, tiling, shares)
        _quantize_segments(sums, operands, q, scales, tuple(sizes))
    else:
        y = int8_linear(x_q, x_scale, w_q, w_scale, bias)
        _quantize_segments(y.view(1, -1, n), None, q, scales, tuple(sizes))
    parts = zip(q.split(list(sizes), -1), scales.split(1, -1), strict=True)
    return [tensor for part in parts for tensor in part]


@functools.cache
def choose_split(m: int, n: int, k: int, count: int) -> tuple[Tiling, int]:
    """The tiling, and the number of shares of the depth, that move the fewest bytes a processor.

    A program loads its share of both matrices, and writes sums of 4 bytes that are read again.
    """

    def cost(choice: tuple[tuple[int, int], int]) -> int:
        width, shares = sum(choice[0]), choice[1]
        programs = -(-m // 64) * -(-n // width) * shares
        depth = -(-k // (shares * 128)) * 128
        return -(-programs // count) * (depth * (64 + width) + 64 * width * 8)

    widths = ((128, 64), (64, 32), (64, 0))
    (block_n, extra_n), shares = min(itertools.product(widths, (1, 2, 4, 8, 16)), key=cost)
    return Tiling(64, block_n, extra_n, 128, warps=4, stages=5, descriptors=True), shares


def _partial_sums(operands: Operands, tiling: Tiling | None, shares: int | None) -> Tensor:
    """The product in int32 [shares, M, N], each of a part of the depth."""
    m, n, k = operands.sizes
    device = operands.x.device
    chosen, chosen_shares = choose_split(m, n, k, processors(device))
    how, shares = tiling or chosen, shares or chosen_shares
    # A share is a whole number of blocks, and none is empty.
    depth = triton.cdiv(k, shares * how.block_k) * how.block_k
    shares = triton.cdiv(k, depth)
    sums = torch.empty((shares, m, n), dtype=torch.int32, device=device)
    launch(
        _partial_kernel,
        (triton.cdiv(m, how.block_m), triton.cdiv(n, how.width), shares),
        *loads(operands, how),
        sums,
        m,
        n,
        k,
        depth,
        **_loop(operands, how),
        device=device,
    )
    return sums


def _loop(operands: Operands, how: Tiling) -> dict[str, object]:
    """`meta` without what the sums alone have no use for."""
    return {name: value for name, value in meta(operands, how).items() if name != "SMALL"}


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
def _partial_kernel(  # noqa: ANN202
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
def _segments_kernel(  # noqa: ANN202
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
