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
from ssmc.kernels.cpu.products import TILE_W, TILE_X, pack_rows, rows_product, tile_product
from ssmc.kernels.cpu.quantize import quantize_segments
from ssmc.kernels.cpu.vectors import ROWS
from ssmc.kernels.cpu.words import arguments_at, float32_at, int8_at, keep, to_int8

FEW = 8  # rows of x that are multiplied one by one
PANEL = ROWS * TILE_W
ONE = np.float32(1)


@njit
def _blocks(count, size, thread, threads):
    """The blocks of `size` that are a thread's: their first element, and that behind the last."""
    blocks = (count + size - 1) // size
    first, last = blocks * thread // threads, blocks * (thread + 1) // threads
    return first * size, min(count, last * size)


@njit
def add(values, y):
    """y += values."""
    for i in range(len(values)):
        y[i] += values[i]


@njit
def _finish(sums, y, count, first, row, a):
    """Sums of products int32 [count], of columns from `first` on, to what they are to become.

    y float32 is room for as many.
    """
    _, _, _, x_scale, _, n, w_scale, bias, residual, apart, out, out_scale, _ = a
    factor = np.float64(float32_at(x_scale, row + 1)[row])
    factors = float32_at(w_scale + 4 * first, count)
    for i in range(count):
        y[i] = np.float32(np.float64(sums[i]) * (factor * np.float64(factors[i])))
    if bias:
        add(float32_at(bias + 4 * first, count), y)
    if residual:
        add(float32_at(residual + 4 * (row * apart + first), count), y)
    if out_scale:
        scales, q = float32_at(out_scale + 4 * first, count), int8_at(out + row * n + first, count)
        for i in range(count):
            q[i] = to_int8(y[i], ONE / scales[i])
    else:
        written = float32_at(out + 4 * (row * n + first), count)
        for i in range(count):
            written[i] = y[i]


@njit
def _sum_of(values):
    total = np.int32(0)
    for i in range(len(values)):
        total += np.int32(values[i])
    return total


@njit
def copy_rows(source, stride, count, n, out, out_stride):
    """The first n bytes of rows, to rows that lie `out_stride` apart."""
    for row in range(count):
        values, copied = int8_at(source + row * stride, n), int8_at(out + row * out_stride, n)
        for i in range(n):
            copied[i] = values[i]


@njit
def _pack_panel(packed, w, n, k, panel):
    """PANEL rows of the weight for tiles; what is left of 64 columns by way of a copy."""
    blocks, rest = k // 64, k % 64
    tail = np.zeros(ROWS * 64, np.int8)
    for i in range(TILE_W):
        first = panel + i * ROWS
        count, place, source = min(ROWS, n - first), packed + 64 * i, w + first * k
        if count <= 0:
            break
        pack_rows(place, 64 * TILE_W, source, k, count, blocks)
        if rest:
            copy_rows(source + 64 * blocks, k, count, rest, tail.ctypes.data, 64)
            place += blocks * ROWS * 64 * TILE_W
            pack_rows(place, 64 * TILE_W, tail.ctypes.data, 64, count, 1)
    keep(tail)


@njit
def _many(a, thread, threads):
    """Tiles: threads share the rows of x, or where these are few the rows of the weight."""
    x, x_stride, m, _, w, n, _, _, _, _, _, _, k = a
    first, last, left, right = 0, m, 0, n
    if m >= 32 * threads:
        first, last = _blocks(m, TILE_X, thread, threads)
    else:
        left, right = _blocks(n, PANEL, thread, threads)
    steps = (k + 3) // 4
    packed = np.empty((k // 64 + 1) * 64 * PANEL, np.int8)
    tile, excess = np.empty(TILE_X * PANEL, np.int32), np.empty(last - first, np.int32)
    whole, y = np.zeros(TILE_X * steps * 4, np.int8), np.empty(PANEL, np.float32)
    for row in range(first, last):
        excess[row - first] = 128 * _sum_of(int8_at(x + row * x_stride, k))
    for panel in range(left, right, PANEL):
        _pack_panel(packed.ctypes.data, w, n, k, panel)
        width = min(PANEL, n - panel)
        for row in range(first, last, TILE_X):
            count, source, stride = min(TILE_X, last - row), x + row * x_stride, x_stride
            if k % 4:  # a step would read beyond a row
                copy_rows(source, stride, count, k, whole.ctypes.data, 4 * steps)
                source, stride = whole.ctypes.data, 4 * steps
            tile_product(tile.ctypes.data, source, stride, count, packed.ctypes.data, steps)
            for r in range(count):
                sums = tile[r * PANEL : (r + 1) * PANEL]
                for i in range(PANEL):
                    sums[i] -= excess[row + r - first]
                _finish(sums, y, width, panel, row + r, a)
    keep(packed)
    keep(whole)


@njit
def _few(a, thread, threads):
    """Rows of the weight as they are; threads share them."""
    x, x_stride, m, _, w, n, _, _, _, _, _, _, k = a
    first, last = _blocks(n, ROWS, thread, threads)
    blocks = (k + 63) // 64
    wide = blocks * 64
    room = 0 if k == wide else wide  # whole blocks are read where they are
    padded, whole = np.zeros(m * room, np.int8), np.zeros(ROWS * room, np.int8)
    sums, y = np.empty(ROWS, np.int32), np.empty(ROWS, np.float32)
    source_x, apart = x, x_stride
    if room:
        copy_rows(x, x_stride, m, k, padded.ctypes.data, wide)
        source_x, apart = padded.ctypes.data, wide
    for begin in range(first, last, ROWS):
        count, source, stride = min(ROWS, n - begin), w + begin * k, k
        if (begin + count - 1) * k + wide > n * k:  # the weight would be read beyond its end
            copy_rows(source, stride, count, k, whole.ctypes.data, wide)
            source, stride = whole.ctypes.data, wide
        for row in range(m):
            values = source_x + row * apart
            rows_product(sums.ctypes.data, values, source, stride, count, blocks)
            _finish(sums, y, count, begin, row, a)
    keep(padded)
    keep(whole)


@kernel()
def _linear(arguments, thread, threads):
    # x, its stride and rows, x_scale, w, N, w_scale, bias, residual, its stride, out, out_scale, K
    a = arguments_at(arguments, 13)
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
        added_apart, out, vector(out_scale, n), k, work=count * n * k // 8,
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
