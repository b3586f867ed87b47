"""Causal convolution of int8 channels, with its activation and what it is rounded to."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssmc.kernels.cpu.launch import contiguous, empty, kernel, launch, rows, vector
from ssmc.kernels.cpu.numbers import silu
from ssmc.kernels.cpu.quantize import quantize_dynamic
from ssmc.kernels.cpu.words import float32_at, int8_at, int64_at, to_int8
from ssmc.ops.conv import activate, check_conv

ONE = np.float32(1)
BLOCK = 256  # channels at a time


@kernel()
def _conv(arguments, thread, threads):
    """x, its stride, B, L, C, taps, x_scale, w, w_scale, bias, state, new state, SiLU, rounded
    channels, out_scale, q, y."""
    a = int64_at(arguments, 17)
    x, apart, batch, length, width, taps = a[0], a[1], a[2], a[3], a[4], a[5]
    total, y = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.float32)
    scale, inverse = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float32)
    weight, bias = np.empty(taps * BLOCK, np.int32), np.zeros(BLOCK, np.float32)
    blocks = (width + BLOCK - 1) // BLOCK
    for unit in range(batch * blocks * thread // threads, batch * blocks * (thread + 1) // threads):
        sequence, first = unit // blocks, unit % blocks * BLOCK
        n = min(BLOCK, width - first)
        rounded = min(n, max(0, a[13] - first))
        x_scale, w_scale = float32_at(a[6] + 4 * first, n), float32_at(a[8] + 4 * first, n)
        for i in range(n):
            scale[i] = np.float64(x_scale[i]) * np.float64(w_scale[i])
        if a[9]:
            given = float32_at(a[9] + 4 * first, n)
            for i in range(n):
                bias[i] = given[i]
        if rounded:
            out_scale = float32_at(a[14] + 4 * first, rounded)
            for i in range(rounded):
                inverse[i] = ONE / out_scale[i]
        w = int8_at(a[7] + first * taps, n * taps)
        for k in range(taps):
            for i in range(n):
                weight[k * BLOCK + i] = w[i * taps + k]
        start = x + sequence * length * apart + first
        state = a[10] + sequence * (taps - 1) * width + first
        for t in range(length):
            for i in range(n):
                total[i] = 0
            for k in range(taps):
                at = t + k - taps + 1
                if at < 0 and a[10] == 0:
                    continue
                source = start + at * apart if at >= 0 else state + (at + taps - 1) * width
                values, factors = int8_at(source, n), weight[k * BLOCK : (k + 1) * BLOCK]
                for i in range(n):
                    total[i] += np.int32(values[i]) * factors[i]
            for i in range(n):
                y[i] = np.float32(np.float64(total[i]) * scale[i])
            if a[9]:
                for i in range(n):
                    y[i] += bias[i]
            if a[12]:
                for i in range(n):
                    y[i] = silu(y[i])
            row = sequence * length + t
            q = int8_at(a[15] + row * a[13] + first, rounded)
            for i in range(rounded):
                q[i] = to_int8(y[i], inverse[i])
            rest = float32_at(a[16] + 4 * (row * (width - a[13]) + first + rounded - a[13]), n)
            for i in range(rounded, n):
                rest[i - rounded] = y[i]
        for k in range(taps - 1):  # in this order the new state may lie over the old one
            at = length + k - taps + 1
            new = int8_at(a[11] + (sequence * (taps - 1) + k) * width + first, n)
            if at < 0 and a[10] == 0:
                new[:] = 0
                continue
            source = start + at * apart if at >= 0 else state + (at + taps - 1) * width
            values = int8_at(source, n)
            for i in range(n):
                new[i] = values[i]


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
        vector(out_scale, rounded), q, y,
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
