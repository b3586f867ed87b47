"""Norms and rotations that end in int8, a scale a token: a row stays in the cache for all of it."""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ssmc.kernels.cpu.launch import empty, kernel, launch, rows, vector
from ssmc.kernels.cpu.numbers import silu
from ssmc.kernels.cpu.quantize import quantize_row
from ssmc.kernels.cpu.vectors import ROWS, butterflies, float32_rows_sum, float32_rows_sum_32
from ssmc.kernels.cpu.words import arguments_at, float32_at, float_of_bits, int8_at, share
from ssmc.quant.rotation import base_factor, check_block

ZERO, ONE = np.float32(0), np.float32(1)


@njit(fastmath={"contract", "reassoc"})
def _inverse_rms(x, eps):
    total = ZERO
    for i in range(len(x)):
        total += x[i] * x[i]
    return ONE / np.sqrt(total / np.float32(len(x)) + np.float32(eps))


@njit
def _butterfly(x, width):
    """Walsh-Hadamard transform of each `width`, a power of two, of x."""
    half = 1
    if width >= ROWS:
        butterflies(x.ctypes.data, len(x) // ROWS)
        half = ROWS
    while half < width:
        for start in range(0, len(x), 2 * half):
            upper, lower = x[start : start + half], x[start + half : start + 2 * half]
            for i in range(half):
                a, b = upper[i], lower[i]
                upper[i], lower[i] = a + b, a - b
        half *= 2


@njit
def _mix(whole, width, base, signs, room):
    """room = the parts of `whole`, of `width` each, summed with each row of signs [base, base]."""
    wide, blocked, parts = width // 32 * 32, width // 16 * 16, whole.ctypes.data
    for i in range(base):
        row = room[i * width : (i + 1) * width]
        weights, out = signs[i * base :].ctypes.data, row.ctypes.data
        for c in range(width):
            row[c] = ZERO
        for c in range(0, wide, 32):
            float32_rows_sum_32(out + 4 * c, weights, parts + 4 * c, 4 * width, base)
        for c in range(wide, blocked, 16):
            float32_rows_sum(out + 4 * c, weights, parts + 4 * c, 4 * width, base)
        for c in range(blocked, width):
            for j in range(base):
                row[c] += signs[i * base + j] * whole[j * width + c]


@njit
def rotate_row(x, block, base, signs, room):
    """H x / sqrt(block) for each block of x, in place.

    signs is the Paley matrix [base, base] of +-1, `room` as long as a block.
    """
    factor, width = np.float32(1 / math.sqrt(block)), block // base
    _butterfly(x, width)
    for start in range(0, len(x), block):
        whole = x[start : start + block]
        if base > 1:
            _mix(whole, width, base, signs, room)
        for i in range(block):
            whole[i] = (whole[i] if base == 1 else room[i]) * factor


@njit
def normalise(x, weight, eps, y):
    """y = x / rms(x), times the weight at an address (0: none)."""
    factor = _inverse_rms(x, eps)
    if weight:
        factors = float32_at(weight, len(x))
        for i in range(len(x)):
            y[i] = x[i] * factor * factors[i]
    else:
        for i in range(len(x)):
            y[i] = x[i] * factor


@kernel()
def _norm(arguments, thread, threads):
    x, stride, count, n, weight, eps, q, scale, residual, apart, total = arguments_at(arguments, 11)
    scales, y = float32_at(scale, count), np.empty(n, np.float32)
    for row in share(count, thread, threads):
        values = float32_at(x + 4 * row * stride, n)
        if residual:
            added, sums = (
                float32_at(residual + 4 * row * apart, n),
                float32_at(total + 4 * row * n, n),
            )
            for i in range(n):
                sums[i] = added[i] + values[i]
            values = sums
        normalise(values, weight, float_of_bits(eps), y)
        scales[row] = quantize_row(y, int8_at(q + row * n, n))


@kernel()
def _gated(arguments, thread, threads):
    (
        x, stride, count, n, gate_q, apart, gate_scale, weight, eps, group, norm_first, block, base,
        signs, q, scale,
    ) = arguments_at(arguments, 16)  # fmt: skip
    gates, scales, matrix = (
        float32_at(gate_scale, n),
        float32_at(scale, count),
        float32_at(signs, base * base),
    )
    y, gate, room = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(block, np.float32)
    for row in share(count, thread, threads):
        values, integers = float32_at(x + 4 * row * stride, n), int8_at(gate_q + row * apart, n)
        for i in range(n):
            gate[i] = silu(np.float32(integers[i]) * gates[i])
            y[i] = values[i] if norm_first else values[i] * gate[i]
        for start in range(0, n, group):
            part = y[start : start + group]
            normalise(part, weight + 4 * start, float_of_bits(eps), part)
        if norm_first:
            for i in range(n):
                y[i] *= gate[i]
        if block > 1:
            rotate_row(y, block, base, matrix, room)
        scales[row] = quantize_row(y, int8_at(q + row * n, n))


@kernel()
def _hadamard(arguments, thread, threads):
    x, stride, count, n, block, base, signs, y, q, scale = arguments_at(arguments, 10)
    room, own = np.empty(block, np.float32), np.empty(n, np.float32)
    matrix = float32_at(signs, base * base)
    for row in share(count, thread, threads):
        values = float32_at(x + 4 * row * stride, n)
        rotated = float32_at(y + 4 * row * n, n) if y else own
        for i in range(n):
            rotated[i] = values[i]
        rotate_row(rotated, block, base, matrix, room)
        if q:
            float32_at(scale, count)[row] = quantize_row(rotated, int8_at(q + row * n, n))


def _results(x: Tensor) -> tuple[Tensor, Tensor]:
    return empty(x.shape, torch.int8), empty((*x.shape[:-1], 1))


def rms_norm_quantize(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """As ssmc::rms_norm_quantize: x [..., D] to (q int8 [..., D], scale [..., 1])."""
    given, count, apart = rows(x)
    q, scale = _results(x)
    launch(
        _norm,
        given,
        apart,
        count,
        x.shape[-1],
        weight,
        float(eps),
        q,
        scale,
        None,
        0,
        None,
        work=x.numel() if count > 1 else 0,
    )
    return q, scale


def add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """As ssmc::add_rms_norm_quantize: (residual + x [..., D], q int8 [..., D], scale [..., 1])."""
    given, count, apart = rows(x)
    added, _, added_apart = rows(residual)
    (q, scale), total = _results(x), empty(x.shape)
    launch(
        _norm, given, apart, count, x.shape[-1], weight, float(eps), q, scale, added, added_apart,
        total, work=x.numel() if count > 1 else 0,
    )  # fmt: skip
    return total, q, scale


def gated_norm_quantize(
    x: Tensor,
    gate_q: Tensor,
    gate_scale: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    block: int = 1,
) -> tuple[Tensor, Tensor]:
    """As ssmc::gated_norm_quantize: x, gate_q [..., D] to (q int8 [..., D], scale [..., 1])."""
    check_block(x.shape[-1], block)
    given, count, apart = rows(x)
    gate, _, gate_apart = rows(gate_q)
    base, signs = base_factor(block)
    q, scale = _results(x)
    n = x.shape[-1]
    launch(
        _gated, given, apart, count, n, gate, gate_apart, vector(gate_scale, n), weight,
        float(eps), group_size or n, int(norm_before_gate), block, base, signs, q, scale,
        work=x.numel() if count > 1 else 0,
    )  # fmt: skip
    return q, scale


def hadamard(x: Tensor, block: int) -> Tensor:
    """As ssmc::hadamard: H x / sqrt(block) for each run of `block` channels of x [..., n]."""
    check_block(x.shape[-1], block)
    given, count, apart = rows(x)
    base, signs = base_factor(block)
    y = empty(x.shape)
    launch(
        _hadamard,
        given,
        apart,
        count,
        x.shape[-1],
        block,
        base,
        signs,
        y,
        None,
        None,
        work=x.numel() if count > 1 else 0,
    )
    return y


def hadamard_quantize(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """As ssmc::hadamard_quantize: x [..., D] to (q int8 [..., D], scale [..., 1])."""
    check_block(x.shape[-1], block)
    given, count, apart = rows(x)
    base, signs = base_factor(block)
    q, scale = _results(x)
    launch(
        _hadamard,
        given,
        apart,
        count,
        x.shape[-1],
        block,
        base,
        signs,
        None,
        q,
        scale,
        work=x.numel() if count > 1 else 0,
    )
    return q, scale
