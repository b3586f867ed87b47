"""The scan of Mamba-2: for each head the recurrence itself, on states that stay in the cache."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from torch import Tensor

from ssmc import ops
from ssmc.kernels.cpu.launch import contiguous, empty, kernel, launch, rows, run_torch, vector
from ssmc.kernels.cpu.numbers import LOG2E, exp2, softplus
from ssmc.kernels.cpu.words import arguments_at, float32_at, float_of_bits, int8_at, share

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


@njit
def _dequantise(q, scale, values):
    integers = int8_at(q, len(values))
    for i in range(len(values)):
        values[i] = np.float32(integers[i]) * scale


@njit
def _first_state(state, new):
    """The state at an address, or zeros where there is none, where the new one is to be."""
    if state:
        given = float32_at(state, len(new))
        for i in range(len(new)):
            new[i] = given[i]
    else:
        new[:] = ZERO


@kernel()
def _scan(arguments, thread, threads):
    (
        x, x_apart, x_scale, dt, dt_apart, dt_scale, A, B, B_apart, B_scale, C, C_apart, C_scale, D,
        dt_bias, state, new, y, batch, length, heads, width, groups, rank, least, most, backwards,
    ) = arguments_at(arguments, 27)  # fmt: skip
    shortest, longest = np.float32(float_of_bits(least)), np.float32(float_of_bits(most))
    B_now, C_now = np.empty(rank, np.float32), np.empty(rank, np.float32)
    rates, dt_scales = float32_at(A, heads), float32_at(dt_scale, heads)
    count, cells = batch * length * groups, width * rank
    B_scales, C_scales = float32_at(B_scale, count), float32_at(C_scale, count)
    for unit in share(batch * heads, thread, threads):
        sequence, head = unit // heads, unit % heads
        group = head * groups // heads
        h = float32_at(new + 4 * unit * cells, cells)
        _first_state(state + 4 * unit * cells if state else 0, h)
        scales = float32_at(x_scale + 4 * head * width, width)
        bias = float32_at(dt_bias, heads)[head] if dt_bias else ZERO
        skip = float32_at(D, heads)[head] if D else ZERO
        for step in range(length):
            row = sequence * length + (length - 1 - step if backwards else step)
            size = np.float32(int8_at(dt + row * dt_apart, heads)[head]) * dt_scales[head] + bias
            size = min(max(softplus(size), shortest), longest)
            decay = exp2(size * rates[head] * LOG2E)
            at, offset = row * groups + group, group * rank
            _dequantise(B + row * B_apart + offset, B_scales[at], B_now)
            _dequantise(C + row * C_apart + offset, C_scales[at], C_now)
            values = int8_at(x + row * x_apart + head * width, width)
            out = float32_at(y + 4 * (row * heads + head) * width, width)
            for p in range(width):
                value = np.float32(values[p]) * scales[p]
                product = _advance(h[p * rank : (p + 1) * rank], decay, size * value, B_now, C_now)
                out[p] = product + skip * value


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
