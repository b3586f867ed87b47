"""The scan of Mamba-2: for each head the recurrence itself, on states that stay in the cache."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from torch import Tensor

from ssmc import ops
from ssmc.kernels.cpu.kernel import kernel
from ssmc.kernels.cpu.lanes import (
    advance_rows_16,
    advance_rows_128,
    dequantise_token,
    sum_rows,
)
from ssmc.kernels.cpu.launch import contiguous, empty, launch, rows, run_torch, vector
from ssmc.kernels.cpu.numbers import LOG2E, exp2, softplus
from ssmc.kernels.cpu.vectors import ROWS
from ssmc.kernels.cpu.words import (
    arguments_at,
    float32_at,
    float_of_bits,
    int8_at,
    keep,
    scratch,
    share,
)

ZERO = np.float32(0)
CHUNK = 64  # positions whose step sizes and decays are made at a time


@njit(fastmath={"contract", "reassoc"})
def _advance(h, decay, update, B, C):
    """h = decay * h + update * B, in place; the product of h and C. All [N]."""
    total = ZERO
    for s in range(len(h)):
        value = decay * h[s] + update * B[s]
        h[s] = value
        total += value * C[s]
    return total


@njit
def _advance_state(h, width, rank, decay, update, B, C, partial, y):
    """A head's state [width, rank] by a position, of which y [width] is what it puts out.

    All are addresses; decay one float32, update [width], B, C [rank]; partial is room for 16 sums
    of each row, of a multiple of 16 rows.
    """
    totals, out = (
        float32_at(partial, width * ROWS),
        float32_at(y, (width + ROWS - 1) // ROWS * ROWS),
    )
    totals[:] = ZERO
    wide, whole = rank // 128 * 128, rank // ROWS * ROWS
    for s in range(0, wide, 128):
        place = 4 * s
        advance_rows_128(h + place, 4 * rank, decay, update, B + place, C + place, partial, width)
    for s in range(wide, whole, ROWS):
        place = 4 * s
        advance_rows_16(h + place, 4 * rank, decay, update, B + place, C + place, partial, width)
    for first in range(0, width, ROWS):
        sum_rows(y + 4 * first, partial + 4 * ROWS * first)
    if whole < rank:
        rest, place = rank - whole, 4 * whole
        factor, updates = float32_at(decay, 1)[0], float32_at(update, width)
        b, c = float32_at(B + place, rest), float32_at(C + place, rest)
        for p in range(width):
            states = float32_at(h + 4 * p * rank + place, rest)
            out[p] += _advance(states, factor, updates[p], b, c)


@njit
def _dequantise(q, scale, count, out):
    """int8 [count] times one float32, all at addresses."""
    dequantise_token(out, q, scale, count // ROWS)
    integers, values, factor = int8_at(q, count), float32_at(out, count), float32_at(scale, 1)[0]
    for i in range(count // ROWS * ROWS, count):
        values[i] = np.float32(integers[i]) * factor


@njit
def _first_state(state, cells, new):
    """The state at an address, or zeros where there is none, where the new one is to be."""
    h, given = float32_at(new, cells), float32_at(state, cells if state else 0)
    if state == new:
        return
    if state:
        for i in range(cells):
            h[i] = given[i]
    else:
        h[:] = ZERO


@njit(fastmath={"contract"})
def _steps(dt, apart, scale, bias, shortest, longest, rate, count, sizes, decays):
    """A head's step sizes and decays at `count` positions, whose int8 are `apart` bytes apart."""
    for i in range(count):
        sizes[i] = np.float32(int8_at(dt + i * apart, 1)[0]) * scale + bias
    for i in range(count):
        sizes[i] = min(max(softplus(sizes[i]), shortest), longest)
    for i in range(count):
        decays[i] = exp2(sizes[i] * rate * LOG2E)


@kernel()
def _scan(arguments, thread, threads):
    (
        x, x_apart, x_scale, dt, dt_apart, dt_scale, A, B, B_apart, B_scale, C, C_apart, C_scale, D,
        dt_bias, state, new, y, batch, length, heads, width, groups, rank, least, most, backwards,
    ) = arguments_at(arguments, 27)  # fmt: skip
    shortest, longest = np.float32(float_of_bits(least)), np.float32(float_of_bits(most))
    rates, dt_scales = float32_at(A, heads), float32_at(dt_scale, heads)
    cells, padded, way = width * rank, (width + ROWS - 1) // ROWS * ROWS, -1 if backwards else 1
    memory, room = scratch(4 * (padded * (ROWS + 2) + 2 * CHUNK + 2 * rank))
    update, sums = room + 4 * padded * ROWS, room + 4 * padded * (ROWS + 1)
    first_size = room + 4 * padded * (ROWS + 2)
    first_decay, B_now = first_size + 4 * CHUNK, first_size + 8 * CHUNK
    C_now = B_now + 4 * rank
    sizes, decays = float32_at(first_size, CHUNK), float32_at(first_decay, CHUNK)
    updates, products = float32_at(update, width), float32_at(sums, width)
    for unit in share(batch * heads, thread, threads):
        sequence, head = unit // heads, unit % heads
        group, h = head * groups // heads, new + 4 * unit * cells
        _first_state(state + 4 * unit * cells if state else 0, cells, h)
        scales = float32_at(x_scale + 4 * head * width, width)
        bias = float32_at(dt_bias, heads)[head] if dt_bias else ZERO
        skip = float32_at(D, heads)[head] if D else ZERO
        for step in range(length):
            row = sequence * length + (length - 1 - step if backwards else step)
            now = step % CHUNK
            if now == 0:
                _steps(
                    dt + row * dt_apart + head, way * dt_apart, dt_scales[head], bias, shortest,
                    longest, rates[head], min(CHUNK, length - step), sizes, decays,
                )  # fmt: skip
            at, offset = row * groups + group, group * rank
            _dequantise(B + row * B_apart + offset, B_scale + 4 * at, rank, B_now)
            _dequantise(C + row * C_apart + offset, C_scale + 4 * at, rank, C_now)
            values = int8_at(x + row * x_apart + head * width, width)
            for p in range(width):
                updates[p] = sizes[now] * (np.float32(values[p]) * scales[p])
            _advance_state(h, width, rank, first_decay + 4 * now, update, B_now, C_now, room, sums)
            out = float32_at(y + 4 * (row * heads + head) * width, width)
            for p in range(width):
                out[p] = products[p] + skip * (np.float32(values[p]) * scales[p])
    keep(memory)


def int8_ssd_scan(
    x_q: Tensor,
    x_scale: Tensor,
    dt_q: Tensor,
    dt_scale: Tensor,
    A: Tensor,
    B_q: Tensor,
    B_scale: Tensor,
    C_q: Tensor,
    C_scale: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state: Tensor | None = None,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """As ssmc::int8_ssd_scan."""
    operands = (x_q, x_scale, dt_q, dt_scale, A, B_q, B_scale, C_q, C_scale, D, dt_bias)
    return scan(*operands, state, dt_min, dt_max, reverse, None)


def scan(
    x_q: Tensor,
    x_scale: Tensor,
    dt_q: Tensor,
    dt_scale: Tensor,
    A: Tensor,
    B_q: Tensor,
    B_scale: Tensor,
    C_q: Tensor,
    C_scale: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    dt_min: float,
    dt_max: float,
    reverse: bool,
    new_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`int8_ssd_scan` with the memory for the new state, which may be that of the old."""
    batch, length, heads, width = x_q.shape
    groups, rank = B_q.shape[2:]
    given = (x_q, x_scale, dt_q, dt_scale, A, B_q, B_scale, C_q, C_scale, D, dt_bias)
    per_group = (1, batch * length * groups)
    whole = all(s.numel() in per_group for s in (B_scale, C_scale))
    if not whole or x_scale.numel() not in (1, heads * width) or dt_scale.numel() not in (1, heads):
        return run_torch(ops.int8_ssd_scan, *given, state, dt_min, dt_max, reverse)
    x, _, x_apart = rows(x_q.flatten(2))
    dt, _, dt_apart = rows(dt_q)
    B, _, B_apart = rows(B_q.flatten(2))
    C, _, C_apart = rows(C_q.flatten(2))
    y = empty((batch, length, heads, width))
    new = empty((batch, heads, width, rank)) if new_state is None else new_state
    count = batch * length * groups
    launch(
        _scan, x, x_apart, vector(x_scale, heads * width), dt, dt_apart, vector(dt_scale, heads),
        contiguous(A), B, B_apart, vector(B_scale, count), C, C_apart, vector(C_scale, count), D,
        dt_bias, None if state is None else contiguous(state), new, y, batch, length, heads, width,
        groups, rank, float(dt_min), float(dt_max), int(reverse), work=2 * x_q.numel() * rank,
    )  # fmt: skip
    return y, new
