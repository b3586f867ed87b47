"""Rounding of float32 to int8, with static scales and with scales of their own."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ssmc import ops
from ssmc.kernels.cpu.kernel import kernel
from ssmc.kernels.cpu.launch import contiguous, empty, launch, rows, run_torch, vector
from ssmc.kernels.cpu.words import (
    arguments_at,
    float32_at,
    float32_of_bits,
    int8_at,
    int32_at,
    scale_for,
    share,
    to_int8,
)

ONE = np.float32(1)
MAGNITUDE = np.int32(0x7FFFFFFF)


@njit
def _largest(x):
    """The largest magnitude: that whose bits without a sign are the largest integer."""
    words, largest = int32_at(x.ctypes.data, len(x)), np.int32(0)
    for i in range(len(words)):
        largest = max(largest, words[i] & MAGNITUDE)
    return float32_of_bits(largest)


@njit
def quantize_row(x, q):
    """Round x float32 [n] to q int8 [n]; the scale."""
    scale = scale_for(_largest(x))
    inverse = ONE / scale
    for i in range(len(x)):
        q[i] = to_int8(x[i], inverse)
    return scale


@kernel()
def _segment(arguments, thread, threads):
    x, stride, count, n, q, scale = arguments_at(arguments, 6)
    scales = float32_at(scale, count)
    for row in share(count, thread, threads):
        values = float32_at(x + 4 * row * stride, n)
        scales[row] = quantize_row(values, int8_at(q + row * n, n))


@kernel()
def _static(arguments, thread, threads):
    x, count, n, scale, q = arguments_at(arguments, 5)
    scales = float32_at(scale, n)
    for row in share(count, thread, threads):
        values, rounded = float32_at(x + 4 * row * n, n), int8_at(q + row * n, n)
        for i in range(n):
            rounded[i] = to_int8(values[i], ONE / scales[i])


def quantize_dynamic(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """As ssmc::quantize_dynamic, bit for bit: x [..., C] to (int8, scale float32 [..., 1])."""
    if bits != 8:
        return run_torch(ops.quantize_dynamic, x, bits)
    given, count, apart = rows(x)
    q, scale = empty(x.shape, torch.int8), empty((*x.shape[:-1], 1))
    launch(_segment, given, apart, count, x.shape[-1], q, scale, work=x.numel() if count > 1 else 0)
    return q, scale


def quantize_segments(x: Tensor, sizes: list[int]) -> list[Tensor]:
    """Segments of x [..., C], of `sizes` channels, each rounded: [q_0, scale_0, q_1, ...]."""
    return [tensor for part in x.split(list(sizes), -1) for tensor in quantize_dynamic(part)]


def quantize(x: Tensor, scale: Tensor, bits: int = 8) -> Tensor:
    """As ssmc::quantize, bit for bit: x [..., C] to int8 with scale [] or [..., C]."""
    width = x.shape[-1] if scale.dim() < 2 else scale.numel()
    if bits != 8 or (scale.dim() > 1 and scale.shape != x.shape[-scale.dim() :]):
        return run_torch(ops.quantize, x, scale, bits)
    q = empty(x.shape, torch.int8)
    launch(
        _static,
        contiguous(x),
        x.numel() // max(width, 1),
        width,
        vector(scale, width),
        q,
        work=x.numel(),
    )
    return q
