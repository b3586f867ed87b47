"""Norms and rotations that end in int8, a scale a token: a row stays in the cache for all of it."""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ssmc.kernels.cpu.kernel import kernel
from ssmc.kernels.cpu.launch import empty, launch, rows, vector
from ssmc.kernels.cpu.numbers import silu
from ssmc.kernels.cpu.quantize import quantize_row
from ssmc.kernels.cpu.vectors import (
    ROWS,
    butterflies,
    float32_rows_sum,
    float32_rows_sum_32,
    float32_rows_sum_128,
    four_parts,
    two_parts,
)
from ssmc.kernels.cpu.words import (
    arguments_at,
    float32_at,
    float_of_bits,
    int8_at,
    keep,
    scratch,
    share,
)
from ssmc.quant.rotation import base_factor, check_block

ZERO, ONE = np.float32(0), np.float32(1)


@njit(fastmath={"contract", "reassoc"})
def _inverse_rms(x, eps):
    total = ZERO
    for i in range(len(x)):
        total += x[i] * x[i]
    return ONE / np.sqrt(total / np.float32(len(x)) + np.float32(eps))


@njit
def _butterfly(x, n, width):
    """Walsh-Hadamard transform of each `width`, a power of two, of float32 [n] at an address."""
    half = 1
    if width >= ROWS:
        butterflies(x, n // ROWS)
        half = ROWS
        while 4 * half <= width:
            for start in range(0, n, 4 * half):
                four_parts(x + 4 * start, 4 * half, half // ROWS)
            half *= 4
        if half < width:
            for start in range(0, n, width):
                two_parts(x + 4 * start, 4 * half, half // ROWS)
        return
    values = float32_at(x, n)
    while half < width:
        for start in range(0, n, 2 * half):
            for i in range(start, start + half):
                a, b = values[i], values[i + half]
                values[i], values[i + half] = a + b, a - b
        half *= 2


@njit
def _mix(parts, width, base, signs, room):
    """room = the parts, of `width` each, summed with each row of signs [base, base]."""
    wide, half, blocked = width // 128 * 128, width // 32 * 32, width // 16 * 16
    values, matrix = float32_at(parts, base * width), float32_at(signs, base * base)
    for i in range(base):
        out, weights = room + 4 * i * width, signs + 4 * i * base
        row = float32_at(out, width)
        for c in range(width):
            row[c] = ZERO
        for c in range(0, wide, 128):
            float32_rows_sum_128(out + 4 * c, weights, parts + 4 * c, 4 * width, base)
        for c in range(wide, half, 32):
            float32_rows_sum_32(out + 4 * c, weights, parts + 4 * c, 4 * width, base)
        for c in range(half, blocked, 16):
            float32_rows_sum(out + 4 * c, weights, parts + 4 * c, 4 * width, base)
        for c in range(blocked, width):
            for j in range(base):
                row[c] += matrix[i * base + j] * values[j * width + c]


@njit
def rotate_row(x, n, block, base, signs, room):
    """H x / sqrt(block) for each block of float32 [n] at an address, in place.

    signs is the Paley matrix [base, base] of +-1, `room` as long as a block.
    """
    factor, width = np.float32(1 / math.sqrt(block)), block // base
    _butterfly(x, n, width)
    for start in range(0, n, block):
        whole = float32_at(x + 4 * start, block)
        if base > 1:
            _mix(x + 4 * start, width, base, signs, room)
        mixed = float32_at(room if base > 1 else x + 4 * start, block)
        for i in range(block):
            whole[i] = mixed[i] * factor


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
    memory, room = scratch(4 * n)
    scales, y = float32_at(scale, count), float32_at(room, n)
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
    keep(memory)


@kernel()
def _gated(arguments, thread, threads):
    (
        x, stride, count, n, gate_q, apart, gate_scale, weight, eps, group, norm_first, block, base,
        signs, q, scale,
    ) = arguments_at(arguments, 16)  # fmt: skip
    memory, room = scratch(4 * (2 * n + block))
    gates, scales = float32_at(gate_scale, n), float32_at(scale, count)
    y, gate = float32_at(room, n), float32_at(room + 4 * n, n)
    for row in share(count, thread, threads):
        values, integers = float32_at(x + 4 * row * stride, n), int8_at(gate_q + row * apart, n)
        for i in range(n):
            gate[i] = silu(np.float32(integers[i]) * gates[i])
            y[i] = values[i] if norm_first else values[i] * gate[i]
        for start in range(0, n, group):
            part = float32_at(room + 4 * start, group)
            normalise(part, weight + 4 * start, float_of_bits(eps), part)
        if norm_first:
            for i in range(n):
                y[i] *= gate[i]
        if block > 1:
            rotate_row(room, n, block, base, signs, room + 8 * n)
        scales[row] = quantize_row(y, int8_at(q + row * n, n))
    keep(memory)


@kernel()
def _hadamard(arguments, thread, threads):
    x, stride, count, n, block, base, signs, y, q, scale = arguments_at(arguments, 10)
    memory, room = scratch(4 * (n + block))
    for row in share(count, thread, threads):
        rotated = y + 4 * row * n if y else room
        values, copied = float32_at(x + 4 * row * stride, n), float32_at(rotated, n)
        for i in range(n):
            copied[i] = values[i]
        rotate_row(rotated, n, block, base, signs, room + 4 * n)
        if q:
            float32_at(scale, count)[row] = quantize_row(copied, int8_at(q + row * n, n))
    keep(memory)


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
