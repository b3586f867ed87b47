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
from ssmc.kernels.cpu.kernel import kernel
from ssmc.kernels.cpu.lanes import add_to, round_to, scaled_sums
from ssmc.kernels.cpu.launch import empty, launch, rows, run_torch, vector
from ssmc.kernels.cpu.products import TILE_W, TILE_X, pack_rows, rows_product, tile_product
from ssmc.kernels.cpu.quantize import quantize_segments
from ssmc.kernels.cpu.vectors import ROWS
from ssmc.kernels.cpu.words import (
    arguments_at,
    float32_at,
    int8_at,
    int32_at,
    keep,
    scratch,
    to_int8,
)

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
def column_parameters(w_scale, bias, out_scale, count, size, room):
    """The scales of columns, their biases, and the inverses of the scales of results.

    Three rows of `size` float32, of which `count` are used; those at address 0 are left out.
    """
    factors, given = float32_at(room, size), float32_at(w_scale, count)
    for i in range(count):
        factors[i] = given[i]
    if bias:
        shifts, given = float32_at(room + 4 * size, size), float32_at(bias, count)
        for i in range(count):
            shifts[i] = given[i]
    if out_scale:
        inverses, scales = float32_at(room + 8 * size, size), float32_at(out_scale, count)
        for i in range(count):
            inverses[i] = ONE / scales[i]


@njit
def finish(sums, excess, x_scale, bias, residual, rounds, count, size, room, out):
    """Sums of products int32 [size], too large by `excess`, to `count` results at `out`.

    room: what `column_parameters` made, and a row for the results.
    """
    blocks, y = size // ROWS, room + 12 * size
    if count == size and not rounds:
        y = out
    scaled_sums(y, sums, excess, x_scale, room, blocks)
    if bias:
        add_to(y, room + 4 * size, blocks)
    if residual and count == size:
        add_to(y, residual, blocks)
    elif residual:
        add(float32_at(residual, count), float32_at(y, count))
    if rounds and count == size:
        round_to(out, y, room + 8 * size, blocks)
    elif rounds:
        values, inverses, q = (
            float32_at(y, count),
            float32_at(room + 8 * size, count),
            int8_at(out, count),
        )
        for i in range(count):
            q[i] = to_int8(values[i], inverses[i])
    elif count < size:
        values, written = float32_at(y, count), float32_at(out, count)
        for i in range(count):
            written[i] = values[i]


@njit
def sum_of(values):
    """The sum of int8."""
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
def pack_panel(packed, w, n, k, panel):
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
def _write_row(sums, excess, first, count, size, row, room, a):
    """Row `row` of the columns from `first` on."""
    _, _, _, x_scale, _, n, _, bias, residual, apart, out, out_scale, _ = a
    added = residual + 4 * (row * apart + first) if residual else 0
    written = out + (1 if out_scale else 4) * (row * n + first)
    finish(sums, excess, x_scale + 4 * row, bias, added, out_scale, count, size, room, written)


@njit
def _many(a, thread, threads):
    """Tiles: threads share the rows of x, or where these are few the rows of the weight."""
    x, x_stride, m, _, w, n, w_scale, bias, _, _, _, out_scale, k = a
    first, last, left, right = 0, m, 0, n
    if m >= 32 * threads:
        first, last = _blocks(m, TILE_X, thread, threads)
    else:
        left, right = _blocks(n, PANEL, thread, threads)
    steps = (k + 3) // 4
    panel_size, tile_size = (k // 64 + 1) * 64 * PANEL, 4 * TILE_X * PANEL
    memory, packed = scratch(panel_size + tile_size + 16 * PANEL + TILE_X * steps * 4 + 4 * m)
    tile, columns = packed + panel_size, packed + panel_size + tile_size
    excess = int32_at(columns + 16 * PANEL, m)
    whole = columns + 16 * PANEL + 4 * m
    for row in range(first, last):
        excess[row] = 128 * sum_of(int8_at(x + row * x_stride, k))
    for panel in range(left, right, PANEL):
        pack_panel(packed, w, n, k, panel)
        width = min(PANEL, n - panel)
        shifts, scales = bias + 4 * panel if bias else 0, out_scale + 4 * panel if out_scale else 0
        column_parameters(w_scale + 4 * panel, shifts, scales, width, PANEL, columns)
        for row in range(first, last, TILE_X):
            count, source, stride = min(TILE_X, last - row), x + row * x_stride, x_stride
            if k % 4:  # a step would read beyond a row
                copy_rows(source, stride, count, k, whole, 4 * steps)
                source, stride = whole, 4 * steps
            tile_product(tile, source, stride, count, packed, steps)
            for r in range(count):
                sums = tile + 4 * PANEL * r
                _write_row(sums, excess[row + r], panel, width, PANEL, row + r, columns, a)
    keep(memory)


@njit
def _few(a, thread, threads):
    """Rows of the weight as they are; threads share them."""
    x, x_stride, m, _, w, n, w_scale, bias, _, _, _, out_scale, k = a
    first, last = _blocks(n, ROWS, thread, threads)
    blocks = (k + 63) // 64
    wide = blocks * 64
    room = 0 if k == wide else wide  # whole blocks are read where they are
    memory, sums = scratch((4 + 16) * ROWS + (m + ROWS) * room)
    columns = sums + 4 * ROWS
    whole = columns + 16 * ROWS
    source_x, apart = x, x_stride
    if room:
        source_x, apart = whole + ROWS * wide, wide
        copy_rows(x, x_stride, m, k, source_x, wide)
    for begin in range(first, last, ROWS):
        count, source, stride = min(ROWS, n - begin), w + begin * k, k
        if (begin + count - 1) * k + wide > n * k:  # the weight would be read beyond its end
            copy_rows(source, stride, count, k, whole, wide)
            source, stride = whole, wide
        shifts, scales = bias + 4 * begin if bias else 0, out_scale + 4 * begin if out_scale else 0
        column_parameters(w_scale + 4 * begin, shifts, scales, count, ROWS, columns)
        for row in range(m):
            rows_product(sums, source_x + row * apart, source, stride, count, blocks)
            _write_row(sums, 0, begin, count, ROWS, row, columns, a)
    keep(memory)


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
