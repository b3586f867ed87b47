"""int8 products, with what follows them: a bias, a residual, the next quantisation.

Many rows of x go through tiles of registers; the weight is packed for these a few rows at a time,
which costs little beside the products and leaves no second copy. Few rows are multiplied with the
rows of the weight as they are: that reads each once, at the rate memory gives them.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ssmc import ops
from ssmc.kernels.cpu.launch import empty, kernel, launch, rows, run_torch, vector
from ssmc.kernels.cpu.products import (
    ROWS,
    TILE_W,
    TILE_X,
    pack_rows,
    rows_product,
    tile_product,
)
from ssmc.kernels.cpu.quantize import quantize_segments
from ssmc.kernels.cpu.words import float32_at, int8_at, int32_at, int64_at, keep, to_int8

FEW = 8  # rows of x that are multiplied one by one
PANEL = ROWS * TILE_W
ONE = np.float32(1)


@njit(inline="always")
def _share(count, size, thread, threads):
    """The blocks of `size` of a thread: (first, behind the last), as numbers of elements."""
    blocks = (count + size - 1) // size
    return (
        blocks * thread // threads * size,
        min(count, blocks * (thread + 1) // threads * size),
    )


@njit
def _finish(sums, count, first, row, a):
    """Sums of products int32 [count], of columns from `first` on, to what they are to become."""
    n = a[5]
    x_scale = np.float64(float32_at(a[3] + 4 * row, 1)[0])
    w_scale = float32_at(a[6] + 4 * first, count)
    residual, out = a[8] + 4 * (row * a[9] + first), a[10] + row * n * a[11] + first * a[11]
    y = np.empty(PANEL, np.float32)
    for i in range(count):
        y[i] = np.float32(np.float64(sums[i]) * (x_scale * np.float64(w_scale[i])))
    if a[7]:
        bias = float32_at(a[7] + 4 * first, count)
        for i in range(count):
            y[i] += bias[i]
    if a[8]:
        added = float32_at(residual, count)
        for i in range(count):
            y[i] = added[i] + y[i]
    if a[12]:
        out_scale, q = float32_at(a[12] + 4 * first, count), int8_at(out, count)
        for i in range(count):
            q[i] = to_int8(y[i], ONE / out_scale[i])
    else:
        written = float32_at(out, count)
        for i in range(count):
            written[i] = y[i]


@njit
def _sum_of(values):
    total = np.int32(0)
    for i in range(len(values)):
        total += np.int32(values[i])
    return total


@njit
def _many(a, thread, threads):
    """Tiles: threads share the rows of x, or where these are few the rows of the weight."""
    x, x_stride, m, w, n, k = a[0], a[1], a[2], a[4], a[5], a[13]
    first, last, column, columns = 0, m, 0, n
    if m >= 32 * threads:
        first, last = _share(m, TILE_X, thread, threads)
    else:
        column, columns = _share(n, PANEL, thread, threads)
    steps, blocks, rest = (k + 3) // 4, k // 64, k % 64
    packed = np.empty((k // 64 + 1) * 64 * PANEL, np.int8)
    at = packed.ctypes.data
    tile, excess = np.empty(TILE_X * PANEL, np.int32), np.empty(last - first, np.int32)
    tail, ends = np.zeros(ROWS * 64, np.int8), np.zeros(TILE_X * (steps * 4), np.int8)
    for row in range(first, last):
        excess[row - first] = 128 * _sum_of(int8_at(x + row * x_stride, k))
    for panel in range(column, columns, PANEL):
        for i in range(TILE_W):
            begin = panel + i * ROWS
            have = min(ROWS, n - begin)
            if have <= 0:
                continue
            place, source = at + 64 * i, w + begin * k
            pack_rows(place, 64 * TILE_W, source, k, have, blocks)
            if rest:
                for r in range(have):
                    end = int8_at(source + r * k + 64 * blocks, rest)
                    for j in range(rest):
                        tail[64 * r + j] = end[j]
                behind = place + blocks * ROWS * 64 * TILE_W
                pack_rows(behind, 64 * TILE_W, tail.ctypes.data, 64, have, 1)
        width = min(PANEL, n - panel)
        for row in range(first, last, TILE_X):
            have = min(TILE_X, last - row)
            source, stride = x + row * x_stride, x_stride
            if k % 4:  # a step would read beyond a row
                stride = 4 * steps
                for r in range(have):
                    values = int8_at(source + r * x_stride, k)
                    for j in range(k):
                        ends[r * stride + j] = values[j]
                source = ends.ctypes.data
            tile_product(tile.ctypes.data, source, stride, have, at, steps)
            for r in range(have):
                sums = tile[r * PANEL : (r + 1) * PANEL]
                for j in range(PANEL):
                    sums[j] -= excess[row + r - first]
                _finish(sums, width, panel, row + r, a)
    keep(packed)


@njit
def _few(a, thread, threads):
    """Rows of the weight as they are; threads share them."""
    x, x_stride, m, w, n, k = a[0], a[1], a[2], a[4], a[5], a[13]
    first, last = _share(n, ROWS, thread, threads)
    blocks = (k + 63) // 64
    padded, sums = np.zeros(m * blocks * 64, np.int8), np.empty(ROWS, np.int32)
    for row in range(m):
        values = int8_at(x + row * x_stride, k)
        for j in range(k):
            padded[row * blocks * 64 + j] = values[j]
    copy = np.zeros(ROWS * blocks * 64, np.int8)
    for begin in range(first, last, ROWS):
        have = min(ROWS, n - begin)
        source, stride = w + begin * k, k
        if (begin + have - 1) * k + blocks * 64 > n * k:  # it would be read beyond its end
            stride = blocks * 64
            for r in range(have):
                values = int8_at(source + r * k, k)
                for j in range(k):
                    copy[r * stride + j] = values[j]
            source = copy.ctypes.data
        for row in range(m):
            place = padded.ctypes.data + row * blocks * 64
            rows_product(sums.ctypes.data, place, source, stride, have, blocks)
            _finish(sums, have, begin, row, a)
    keep(padded)


@kernel()
def _linear(arguments, thread, threads):
    """x, its stride and rows, x_scale, w, N, w_scale, bias, residual, its stride, out, its bytes,
    out_scale, K."""
    a = int64_at(arguments, 14)
    if a[2] <= FEW:
        _few(a, thread, threads)
    else:
        _many(a, thread, threads)


def _multiply(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    x, count, apart = rows(x_q)
    n, k = w_q.shape
    out = empty((*x_q.shape[:-1], n), torch.float32 if out_scale is None else torch.int8)
    added, _, added_apart = (None, 0, 0) if residual is None else rows(residual)
    launch(
        _linear, x, apart, count, vector(x_scale, count), w_q, n, vector(w_scale, n), bias, added,
        added_apart, out, out.element_size(), vector(out_scale, n), k,
    )  # fmt: skip
    return out


def _is_packed(w_q: Tensor) -> bool:
    return w_q.dtype == torch.uint8


def int8_linear(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """As ssmc::int8_linear, bit for bit: x_q [..., K], w_q [N, K] -> float32 [..., N]."""
    if _is_packed(w_q):  # in groups of scales that do not factor out
        return run_torch(ops.int8_linear, x_q, x_scale, w_q, w_scale, bias)
    return _multiply(x_q, x_scale, w_q, w_scale, bias)


def int8_linear_add(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
) -> Tensor:
    """As ssmc::int8_linear_add, bit for bit."""
    if _is_packed(w_q):
        return run_torch(ops.int8_linear_add, x_q, x_scale, w_q, w_scale, bias, residual)
    return _multiply(x_q, x_scale, w_q, w_scale, bias, residual=residual)


def int8_linear_quantize(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
) -> Tensor:
    """As ssmc::int8_linear_quantize, bit for bit."""
    if _is_packed(w_q):
        return run_torch(ops.int8_linear_quantize, x_q, x_scale, w_q, w_scale, bias, out_scale)
    return _multiply(x_q, x_scale, w_q, w_scale, bias, out_scale=out_scale)


def int8_linear_split(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    sizes: list[int],
) -> list[Tensor]:
    """As ssmc::int8_linear_split, bit for bit."""
    return quantize_segments(int8_linear(x_q, x_scale, w_q, w_scale, bias), sizes)
