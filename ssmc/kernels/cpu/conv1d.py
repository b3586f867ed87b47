"""Causal convolution of int8 channels, with its activation and what it is rounded to."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ssmc.kernels.cpu.kernel import kernel
from ssmc.kernels.cpu.lanes import round_to, scale_sums, silu_of
from ssmc.kernels.cpu.launch import contiguous, empty, launch, rows, vector
from ssmc.kernels.cpu.linear import copy_rows
from ssmc.kernels.cpu.products import TAPS, slide
from ssmc.kernels.cpu.quantize import quantize_dynamic
from ssmc.kernels.cpu.vectors import ROWS
from ssmc.kernels.cpu.words import (
    arguments_at,
    float32_at,
    float64_at,
    int8_at,
    int32_at,
    keep,
    scratch,
    share,
    to_int8,
)
from ssmc.ops.conv import activate, check_conv

ONE = np.float32(1)
RAISED = np.int32(-0x7F7F7F80)  # four bytes of 128
BLOCK = 256  # channels at a time

# Where a thread has what, in rows of a number of 4 bytes for each channel of a block: sums of
# products, results, biases, inverses of scales, values of the last positions, scales (of 8 bytes);
# a position's values, a byte each; taps, of which there may be more than four.
ROW = 4 * BLOCK
SUMS, Y, SHIFT, INVERSE, WINDOW, SCALE, VALUES, WEIGHT = (ROW * i for i in (0, 1, 2, 3, 4, 5, 7, 8))


@njit
def _source(x, apart, state, width, taps, at):
    """The address of the channels at position `at` of a sequence; of those before it in its state.

    0 where there is no state.
    """
    if at >= 0:
        return x + at * apart
    return state + (at + taps - 1) * width if state else 0


@njit
def _any_taps(x, apart, state, width, taps, t, n, room):
    """The sums of products of position t; weights int32 [taps, BLOCK]."""
    total = int32_at(room + SUMS, n)
    total[:] = 0
    for k in range(taps):
        source = _source(x, apart, state, width, taps, t + k - taps + 1)
        if source:
            values, factors = int8_at(source, n), int32_at(room + WEIGHT + ROW * k, n)
            for i in range(n):
                total[i] += np.int32(values[i]) * factors[i]


@njit
def _keep_last(x, apart, state, width, taps, length, n, new):
    """The last taps - 1 positions; in this order they may be written over the old ones."""
    for k in range(taps - 1):
        source = _source(x, apart, state, width, taps, length + k - taps + 1)
        row = int8_at(new + k * width, n)
        if source:
            values = int8_at(source, n)
            for i in range(n):
                row[i] = values[i]
        else:
            row[:] = 0


@njit
def _parameters(first, n, taps, x_scale, w, w_scale, bias, room):
    """The channels' weights, scales and biases, laid out for loops over channels."""
    xs, ws = float32_at(x_scale + 4 * first, n), float32_at(w_scale + 4 * first, n)
    scale, shift = float64_at(room + SCALE, n), float32_at(room + SHIFT, n)
    for i in range(n):
        scale[i] = np.float64(xs[i]) * np.float64(ws[i])
    if bias:
        shifts = float32_at(bias + 4 * first, n)
        for i in range(n):
            shift[i] = shifts[i]
    if taps == TAPS:
        words, kept = int32_at(w + first * taps, n), int32_at(room + WEIGHT, n)
        for i in range(n):
            kept[i] = words[i]
        return
    rows = int8_at(w + first * taps, n * taps)
    for k in range(taps):
        weight = int32_at(room + WEIGHT + ROW * k, n)
        for i in range(n):
            weight[i] = rows[i * taps + k]


@njit
def _first_window(state, width, n, room):
    """The values before the first position, as `slide` takes them."""
    window = int32_at(room + WINDOW, BLOCK)
    window[:] = RAISED
    if state:
        for k in range(TAPS - 1):
            values = int8_at(state + k * width, n)
            for i in range(n):
                window[i] ^= np.int32(np.uint8(values[i])) << np.int32(8 * (k + 1))


@njit
def _four_taps(x, n, blocks, room):
    """The sums of products of a position whose values are at x."""
    if n % ROWS:  # it would be read beyond its end
        copy_rows(x, 0, 1, n, room + VALUES, 0)
        x = room + VALUES
    slide(room + SUMS, room + WINDOW, x, room + WEIGHT, blocks)


@njit
def _write(values, inverse, count, q):
    """Round `count` floats."""
    round_to(q, values, inverse, count // ROWS)
    rest = count // ROWS * ROWS
    x, factors = float32_at(values, count), float32_at(inverse, count)
    out = int8_at(q, count)
    for i in range(rest, count):
        out[i] = to_int8(x[i], factors[i])


@kernel()
def _conv(arguments, thread, threads):
    (
        x, apart, batch, length, width, taps, x_scale, w, w_scale, bias, state, new, activated,
        rounded, out_scale, q, y,
    ) = arguments_at(arguments, 17)  # fmt: skip
    parts = (width + BLOCK - 1) // BLOCK
    memory, room = scratch(WEIGHT + ROW * taps)
    for unit in share(batch * parts, thread, threads):
        sequence, first = unit // parts, unit % parts * BLOCK
        n = min(BLOCK, width - first)
        integers, blocks = min(n, max(0, rounded - first)), (n + ROWS - 1) // ROWS
        _parameters(first, n, taps, x_scale, w, w_scale, bias, room)
        start = x + sequence * length * apart + first
        given = state + sequence * (taps - 1) * width + first if state else 0
        scales = float32_at(out_scale + 4 * first, integers)
        inverses = float32_at(room + INVERSE, integers)
        for i in range(integers):
            inverses[i] = ONE / scales[i]
        _first_window(given, width, n, room)
        for t in range(length):
            if taps == TAPS:
                _four_taps(start + t * apart, n, blocks, room)
            else:
                _any_taps(start, apart, given, width, taps, t, n, room)
            scale_sums(room + Y, room + SUMS, room + SCALE, room + SHIFT, blocks)
            if activated:
                silu_of(room + Y, blocks)
            row = sequence * length + t
            _write(room + Y, room + INVERSE, integers, q + row * rounded + first)
            behind = first + integers - rounded  # floats come after the integers
            floats = float32_at(y + 4 * (row * (width - rounded) + behind), n - integers)
            values = float32_at(room + Y + 4 * integers, n - integers)
            for i in range(n - integers):
                floats[i] = values[i]
        kept = new + sequence * (taps - 1) * width + first
        _keep_last(start, apart, given, width, taps, length, n, kept)
    keep(memory)


def convolve(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    state_q: Tensor | None,
    activation: str,
    out_scale: Tensor | None = None,
    new_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(u_q int8 of as many channels as out_scale has, the others float32, new state)."""
    check_conv("int8_causal_conv1d", x_q, w_q, bias, state_q)
    batch, length, width = x_q.shape
    taps = w_q.shape[1]
    if activation not in ("none", "silu"):
        activate(torch.empty(0), activation)  # says which there are
    x, _, apart = rows(x_q)
    state = None if state_q is None else contiguous(state_q)
    new = empty((batch, taps - 1, width), torch.int8) if new_state is None else new_state
    rounded = 0 if out_scale is None else out_scale.numel()
    q, y = empty((batch, length, rounded), torch.int8), empty((batch, length, width - rounded))
    launch(
        _conv, x, apart, batch, length, width, taps, vector(x_scale, width), contiguous(w_q),
        vector(w_scale, width), bias, state, new, int(activation == "silu"), rounded,
        vector(out_scale, rounded), q, y, work=x_q.numel(),
    )  # fmt: skip
    return q, y, new


def int8_causal_conv1d(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    state_q: Tensor | None = None,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """As ssmc::int8_causal_conv1d: x_q [B, L, C], w_q [C, K], state [B, K-1, C]."""
    return convolve(x_q, x_scale, w_q, w_scale, bias, state_q, activation)[1:]


def int8_causal_conv1d_quantize(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    state_q: Tensor | None,
    activation: str,
    out_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """As ssmc::int8_causal_conv1d_quantize: (u_q int8 [B, L, C], new state)."""
    width = x_q.shape[-1]
    scale = vector(out_scale, width)
    u_q, _, new = convolve(x_q, x_scale, w_q, w_scale, bias, state_q, activation, scale)
    return u_q, new


def int8_causal_conv1d_split(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    state_q: Tensor | None,
    activation: str,
    out_scale: Tensor,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ssmc::int8_causal_conv1d_split: (u_q, B_q, B_scale, C_q, C_scale, new state)."""
    args = (x_q, x_scale, w_q, w_scale, bias, state_q, activation)
    u_q, rest, new = convolve(*args, contiguous(out_scale).reshape(-1))
    B, C = (part.unflatten(-1, (groups, -1)) for part in rest.chunk(2, -1))
    pairs = (*quantize_dynamic(B), *quantize_dynamic(C))
    return u_q.unflatten(-1, out_scale.shape), *pairs, new
