"""An int8 product whose columns fall into segments, each quantised with a scale a row."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels.arithmetic import inverse_of, scale_for, to_int8
from ssmc.kernels.launch import await_inputs, launch
from ssmc.kernels.matmul import Operands, int8_linear, loads, meta, operands_of, rescale
from ssmc.kernels.prefetch import prefetch_rows
from ssmc.kernels.tiles import Tiling, load_tile, multiply, processors, step, zeros

_WIDEST = 320  # columns that one program can hold beside enough rows


def int8_linear_split(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    *,
    tiling: Tiling | None = None,
    fused: bool | None = None,
) -> list[Tensor]:
    """`ssmc.ops.int8_linear_split` on a GPU.

    `fused` in one kernel, whose programs hold whole rows of the result; else a second one quantises
    what the first wrote. By default in one where the rows are enough to occupy the GPU.
    """
    n, k = w_q.shape[0], x_q.shape[-1]
    m = x_q.numel() // max(k, 1)
    shape = x_q.shape[:-1]
    q = torch.empty((*shape, n), dtype=torch.int8, device=x_q.device)
    scales = torch.empty((*shape, len(sizes)), dtype=torch.float32, device=x_q.device)
    fits = w_q.dtype == torch.int8 and n <= _WIDEST
    if fused is None:
        fused = m >= 16 * processors(x_q.device)
    if fits and fused:
        operands = operands_of(x_q, x_scale, w_q, w_scale, bias)
        _fused(operands, q, scales, tuple(sizes), tiling or _split_tiling(n))
    else:
        y = int8_linear(x_q, x_scale, w_q, w_scale, bias, tiling=tiling)
        _quantize_segments(y, q, scales, tuple(sizes))
    parts = zip(q.split(list(sizes), -1), scales.split(1, -1), strict=True)
    return [tensor for part in parts for tensor in part]


def _split_tiling(n: int) -> Tiling:
    """Tiles of 16 rows and all n columns: a power of two, and another for what is left of n."""
    block_n = max(16, triton.next_power_of_2(n + 1) // 2)
    extra_n = 0 if n <= block_n else max(16, triton.next_power_of_2(n - block_n))
    return Tiling(16, block_n, extra_n, 256, stages=4, group=1, descriptors=True, prefetch=True)


def _bounds(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Where each segment begins, and where the last one ends."""
    return (0, *itertools.accumulate(sizes))


def _fused(
    operands: Operands, q: Tensor, scales: Tensor, sizes: tuple[int, ...], how: Tiling
) -> None:
    m, n, k = operands.sizes
    launch(
        _split_kernel,
        (triton.cdiv(m, how.block_m),),
        *loads(operands, how),
        operands.x_scale,
        operands.w_scale,
        operands.bias,
        q,
        scales,
        m,
        n,
        k,
        **meta(operands, how),
        BOUNDS=_bounds(sizes),
        X_STEP=step(operands.x_scale),
        W_STEP=step(operands.w_scale),
        device=q.device,
    )


def _quantize_segments(y: Tensor, q: Tensor, scales: Tensor, sizes: tuple[int, ...]) -> None:
    """Quantise the segments of y float32 [..., N] (contiguous) into q and scales."""
    n = y.shape[-1]
    m = y.numel() // max(n, 1)
    launch(
        _segments_kernel,
        (triton.cdiv(m, 4),),
        y,
        q,
        scales,
        m,
        n,
        BOUNDS=_bounds(sizes),
        WIDTHS=tuple(map(triton.next_power_of_2, sizes)),
        BLOCK_M=4,
        num_warps=4,
        device=y.device,
    )


@triton.jit
def _absmax(y, column, FIRST: tl.constexpr, LAST: tl.constexpr):  # noqa: ANN202
    """The largest magnitude of each row among the columns FIRST .. LAST."""
    inside = (column >= FIRST) & (column < LAST)
    return tl.max(tl.where(inside[None, :], tl.abs(y), 0.0), 1)


@triton.jit
def _spread(scale, factor, column, FIRST: tl.constexpr, LAST: tl.constexpr):  # noqa: ANN202
    """factor [rows, columns] with `scale` [rows] at the columns FIRST .. LAST."""
    inside = (column >= FIRST) & (column < LAST)
    return tl.where(inside[None, :], scale[:, None], factor)


@triton.jit
def _store_integers(y, inverse, row, column, M, N, q):  # noqa: ANN202
    mask = (row < M)[:, None] & (column < N)[None, :]
    address = q + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(address, to_int8(y, inverse), mask=mask)


@triton.jit
def _split_kernel(  # noqa: ANN202, C901
    x_source,
    w_source,
    extra_source,
    x_scale,
    w_scale,
    bias,
    q,
    scales,
    M,
    N,
    K,
    weight,
    x_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXTRA_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SMALL: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SWAP: tl.constexpr,
    PREFETCH: tl.constexpr,
    BOUNDS: tl.constexpr,
    X_STEP: tl.constexpr,
    W_STEP: tl.constexpr,
    CHAIN: tl.constexpr,
):
    top = tl.program_id(0) * BLOCK_M
    if PREFETCH:
        # Each program asks for other rows of the weight, together for all of it.
        share = tl.cdiv(N, tl.num_programs(0))
        prefetch_rows(weight, tl.program_id(0) * share, N, K, 16, CHAIN)
    await_inputs(CHAIN)
    sums = zeros(BLOCK_M, BLOCK_N, tl.int32, SWAP)
    if EXTRA_N > 0:
        extra_sums = zeros(BLOCK_M, EXTRA_N, tl.int32, SWAP)
    for k in range(0, K, BLOCK_K):
        x = load_tile(x_source, top, k, M, K, x_stride, BLOCK_M, BLOCK_K, EVEN_K, DESCRIPTORS)
        part = load_tile(w_source, 0, k, N, K, K, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS)
        if EXTRA_N > 0:
            more = load_tile(
                extra_source, BLOCK_N, k, N, K, K, EXTRA_N, BLOCK_K, EVEN_K, DESCRIPTORS
            )
            extra_sums = multiply(x, more, extra_sums, SWAP)
        sums = multiply(x, part, sums, SWAP)
    row = top + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    if SWAP:
        sums = tl.trans(sums)
    y = rescale(sums, row, column, M, N, x_scale, w_scale, bias, X_STEP, W_STEP, SMALL)
    inverse = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if EXTRA_N > 0:
        extra_column = BLOCK_N + tl.arange(0, EXTRA_N)
        if SWAP:
            extra_sums = tl.trans(extra_sums)
        extra_y = rescale(
            extra_sums, row, extra_column, M, N, x_scale, w_scale, bias, X_STEP, W_STEP, SMALL
        )
        extra_inverse = tl.zeros((BLOCK_M, EXTRA_N), tl.float32)
    SEGMENTS: tl.constexpr = len(BOUNDS) - 1
    for i in tl.static_range(SEGMENTS):
        largest = _absmax(y, column, BOUNDS[i], BOUNDS[i + 1])
        if EXTRA_N > 0:
            other = _absmax(extra_y, extra_column, BOUNDS[i], BOUNDS[i + 1])
            largest = tl.maximum(largest, other)
        scale = scale_for(largest)
        tl.store(scales + row * SEGMENTS + i, scale, mask=row < M)
        inverse = _spread(inverse_of(scale), inverse, column, BOUNDS[i], BOUNDS[i + 1])
        if EXTRA_N > 0:
            extra_inverse = _spread(
                inverse_of(scale), extra_inverse, extra_column, BOUNDS[i], BOUNDS[i + 1]
            )
    _store_integers(y, inverse, row, column, M, N, q)
    if EXTRA_N > 0:
        _store_integers(extra_y, extra_inverse, row, extra_column, M, N, q)


@triton.jit
def _segments_kernel(  # noqa: ANN202
    y,
    q,
    scales,
    M,
    N,
    BOUNDS: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHAIN: tl.constexpr,
):
    await_inputs(CHAIN)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    SEGMENTS: tl.constexpr = len(BOUNDS) - 1
    for i in tl.static_range(SEGMENTS):
        column = BOUNDS[i] + tl.arange(0, WIDTHS[i])
        mask = (row < M)[:, None] & (column < BOUNDS[i + 1])[None, :]
        at = row.to(tl.int64)[:, None] * N + column[None, :]
        value = tl.load(y + at, mask=mask, other=0.0)
        scale = scale_for(tl.max(tl.abs(value), 1))
        tl.store(scales + row * SEGMENTS + i, scale, mask=row < M)
        tl.store(q + at, to_int8(value, inverse_of(scale)[:, None]), mask=mask)
