"""Rotation of queries and keys by the positions of their tokens."""

from __future__ import annotations

import numpy as np
from numba import njit
from torch import Tensor

from ssmc.kernels.cpu.kernel import kernel
from ssmc.kernels.cpu.launch import contiguous, empty, launch
from ssmc.kernels.cpu.numbers import cos_sin
from ssmc.kernels.cpu.words import arguments_at, float32_at, float_of_bits, int64_at, share
from ssmc.ops.attention import check_rotary

F32 = np.float32


@njit
def _angles(frequencies, position, scale, cosines, sines):
    for i in range(len(frequencies)):
        cosine, sine = cos_sin(F32(position) * frequencies[i])
        cosines[i], sines[i] = cosine * scale, sine * scale


@njit
def _turn(x, cosines, sines, y):
    pairs = len(cosines)
    a, b, first, second = x[:pairs], x[pairs:], y[:pairs], y[pairs:]
    for i in range(pairs):
        first[i] = a[i] * cosines[i] - b[i] * sines[i]
    for i in range(pairs):
        second[i] = b[i] * cosines[i] + a[i] * sines[i]
    for i in range(pairs, len(b)):
        second[i] = b[i]


@kernel()
def _rotary(arguments, thread, threads):
    x, frequencies, pairs, position, scale, batch, length, heads, n, y = arguments_at(arguments, 10)
    factor, starts = F32(float_of_bits(scale)), int64_at(position, batch)
    turns, cosines, sines = (
        float32_at(frequencies, pairs),
        np.empty(pairs, F32),
        np.empty(pairs, F32),
    )
    for token in share(batch * length, thread, threads):
        _angles(turns, starts[token // length] + token % length, factor, cosines, sines)
        for head in range(token * heads, (token + 1) * heads):
            values, turned = float32_at(x + 4 * head * n, n), float32_at(y + 4 * head * n, n)
            _turn(values, cosines, sines, turned)


def rotary_embedding(
    x: Tensor, frequencies: Tensor, position: Tensor, scale: float = 1.0
) -> Tensor:
    """As ssmc::rotary_embedding: x [B, L, H, P], frequencies [R], position [B]."""
    check_rotary(x, frequencies, position)
    batch, length, heads, n = x.shape
    y = empty(x.shape)
    launch(
        _rotary, contiguous(x), contiguous(frequencies), frequencies.numel(), contiguous(position),
        float(scale), batch, length, heads, n, y, work=x.numel() if batch * length > 1 else 0,
    )  # fmt: skip
    return y
