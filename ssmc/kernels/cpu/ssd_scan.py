"""The scan of Mamba-2: for each head the recurrence itself, on states that stay in the cache."""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ssmc import ops
from ssmc.kernels.cpu.launch import contiguous, empty, kernel, launch, rows, run_torch, vector
from ssmc.kernels.cpu.numbers import LOG2E, exp2, softplus
from ssmc.kernels.cpu.words import float32_at, float_of_bits, int8_at, int64_at

ZERO = np.float32(0)


@njit(fastmath={"contract", "reassoc"})
def _advance(h, decay, update, B, C):
    """h = decay * h + update * B, in place; the product of h and C. All [N]."""
    total = ZERO
    for s in range(len(h)):
        value = decay * h[s] + update * B[s]
        h[s] = value
        total += value * C[s]
    return total


@kernel()
def _scan(arguments, thread, threads):
    """x, its stride and scale, dt, its stride and scale, A, B, its stride and scale, C, its stride
    and scale, D, dt_bias, state, new state, y, batch, length, heads, channels, groups, states,
    least and largest dt, reverse."""
    a = int64_at(arguments, 27)
    batch, length, heads, width, groups, rank = a[18], a[19], a[20], a[21], a[22], a[23]
    least, largest = np.float32(float_of_bits(a[24])), np.float32(float_of_bits(a[25]))
    B, C = np.empty(rank, np.float32), np.empty(rank, np.float32)
    A, dt_scale = float32_at(a[6], heads), float32_at(a[5], heads)
    for unit in range(batch * heads * thread // threads, batch * heads * (thread + 1) // threads):
        sequence, head = unit // heads, unit % heads
        group, cells = head * groups // heads, width * rank
        new = float32_at(a[16] + 4 * unit * cells, cells)
        if a[15]:
            state = float32_at(a[15] + 4 * unit * cells, cells)
            for i in range(cells):
                new[i] = state[i]
        else:
            new[:] = ZERO
        x_scale = float32_at(a[2] + 4 * head * width, width)
        bias = float32_at(a[14] + 4 * head, 1)[0] if a[14] else ZERO
        skip = float32_at(a[13] + 4 * head, 1)[0] if a[13] else ZERO
        for step in range(length):
            row = sequence * length + (length - 1 - step if a[26] else step)
            dt = np.float32(int8_at(a[3] + row * a[4] + head, 1)[0]) * dt_scale[head] + bias
            dt = min(max(softplus(dt), least), largest)
            decay = exp2(dt * A[head] * LOG2E)
            at = row * groups + group
            B_q, C_q = int8_at(a[7] + row * a[8] + group * rank, rank), int8_at(
                a[10] + row * a[11] + group * rank, rank
            )
            B_scale, C_scale = float32_at(a[9] + 4 * at, 1)[0], float32_at(a[12] + 4 * at, 1)[0]
            for s in range(rank):
                B[s] = np.float32(B_q[s]) * B_scale
                C[s] = np.float32(C_q[s]) * C_scale
            x = int8_at(a[0] + row * a[1] + head * width, width)
            out = float32_at(a[17] + 4 * (row * heads + head) * width, width)
            for p in range(width):
                value = np.float32(x[p]) * x_scale[p]
                h = new[p * rank : (p + 1) * rank]
                out[p] = _advance(h, decay, dt * value, B, C) + skip * value


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
        groups, rank, float(dt_min), float(dt_max), int(reverse),
    )  # fmt: skip
    return y, new
