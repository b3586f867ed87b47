"""Causal convolution of int8 channels, with its activation and what it is rounded to."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ssmc.kernels.cpu.launch import contiguous, empty, kernel, launch, rows, vector
from ssmc.kernels.cpu.numbers import silu
from ssmc.kernels.cpu.quantize import quantize_dynamic
from ssmc.kernels.cpu.words import arguments_at, float32_at, int8_at, int32_at, share, to_int8
from ssmc.ops.conv import activate, check_conv

ONE = np.float32(1)
BLOCK = 256  # channels at a time


@njit
def _source(x, apart, state, width, taps, at):
    """The address of the channels at position `at` of a sequence; of those before it in its state.

    0 where there is no state.
    """
    if at >= 0:
        return x + at * apart
    return state + (at + taps - 1) * width if state else 0


@njit
def _taps(x, apart, state, width, taps, t, weight, total):
    """The sums of products of position t; weight int32 [taps, BLOCK]."""
    total[:] = 0
    for k in range(taps):
        source = _source(x, apart, state, width, taps, t + k - taps + 1)
        if source:
            values, factors = int8_at(source, len(total)), weight[k]
            for i in range(len(total)):
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
def _parameters(first, n, taps, x_scale, w, w_scale, bias, weight, scale, shift):
    """The channels' weights, scales and biases, laid out for loops over channels."""
    xs, ws = float32_at(x_scale + 4 * first, n), float32_at(w_scale + 4 * first, n)
    for i in range(n):
        scale[i] = np.float64(xs[i]) * np.float64(ws[i])
    _by_tap(w + first * taps, n, taps, weight)
    if bias:
        shifts = float32_at(bias + 4 * first, n)
        for i in range(n):
            shift[i] = shifts[i]


@njit
def _by_tap(w, n, taps, weight):
    """int8 [n, taps] at an address to int32 [taps, n]; four taps are the bytes of a word."""
    if taps == 4:
        words = int32_at(w, n)
        for k in range(taps):
            row, left = weight[k], 24 - 8 * k
            for i in range(n):
                row[i] = np.int32(words[i] << left) >> 24
        return
    rows = int8_at(w, n * taps)
    for i in range(n):
        for k in range(taps):
            weight[k, i] = rows[i * taps + k]


@njit(fastmath={"contract"})
def _activate(values):
    for i in range(len(values)):
        values[i] = silu(values[i])


@kernel()
def _conv(arguments, thread, threads):
    (
        x, apart, batch, length, width, taps, x_scale, w, w_scale, bias, state, new, activated,
        rounded, out_scale, q, y,
    ) = arguments_at(arguments, 17)  # fmt: skip
    blocks = (width + BLOCK - 1) // BLOCK
    sums, values = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.float32)
    scale, shift = np.empty(BLOCK, np.float64), np.zeros(BLOCK, np.float32)
    weight = np.empty((taps, BLOCK), np.int32)
    for unit in share(batch * blocks, thread, threads):
        sequence, first = unit // blocks, unit % blocks * BLOCK
        n = min(BLOCK, width - first)
        integers = min(n, max(0, rounded - first))  # of these channels
        _parameters(first, n, taps, x_scale, w, w_scale, bias, weight, scale, shift)
        start = x + sequence * length * apart + first
        given = state + sequence * (taps - 1) * width + first if state else 0
        scales = float32_at(out_scale + 4 * first, integers)
        for t in range(length):
            _taps(start, apart, given, width, taps, t, weight, sums[:n])
            for i in range(n):
                values[i] = np.float32(np.float64(sums[i]) * scale[i]) + shift[i]
            if activated:
                _activate(values[:n])
            row = sequence * length + t
            out = int8_at(q + row * rounded + first, integers)
            for i in range(integers):
                out[i] = to_int8(values[i], ONE / scales[i])
            behind = first + integers - rounded  # floats come after the integers
            floats = float32_at(y + 4 * (row * (width - rounded) + behind), n - integers)
            for i in range(n - integers):
                floats[i] = values[integers + i]
        kept = new + sequence * (taps - 1) * width + first
        _keep_last(start, apart, given, width, taps, length, n, kept)


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
