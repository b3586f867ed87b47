"""What stands between the products of gated MLPs and of mixtures of experts."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ssmc import ops
from ssmc.kernels.cpu.kernel import kernel
from ssmc.kernels.cpu.launch import empty, launch, rows, run_torch
from ssmc.kernels.cpu.norm import rotate_row
from ssmc.kernels.cpu.numbers import LOG2E, exp2, silu
from ssmc.kernels.cpu.quantize import quantize_row
from ssmc.kernels.cpu.words import (
    arguments_at,
    float32_at,
    int8_at,
    int64_at,
    keep,
    scratch,
    share,
)
from ssmc.quant.rotation import base_factor, check_block

ZERO, ONE = np.float32(0), np.float32(1)
LOWEST = np.float32(-np.inf)


@njit(fastmath={"contract"})
def _silu_mul(gate, up, y):
    for i in range(len(y)):
        y[i] = silu(gate[i]) * up[i]


@kernel()
def _gate(arguments, thread, threads):
    gate, apart, up, up_apart, count, n, block, base, signs, q, scale = arguments_at(arguments, 11)
    memory, room = scratch(4 * (n + block))
    y, scales = float32_at(room, n), float32_at(scale, count)
    for row in share(count, thread, threads):
        gates = float32_at(gate + 4 * row * apart, n)
        _silu_mul(gates, float32_at(up + 4 * row * up_apart, n), y)
        if block > 1:
            rotate_row(room, n, block, base, signs, room + 4 * n)
        scales[row] = quantize_row(y, int8_at(q + row * n, n))
    keep(memory)


def silu_mul_quantize(gate: Tensor, up: Tensor, block: int = 1) -> tuple[Tensor, Tensor]:
    """As ssmc::silu_mul_quantize: gate, up [..., D] to (q int8 [..., D], scale [..., 1])."""
    check_block(gate.shape[-1], block)
    gates, count, apart = rows(gate)
    ups, _, up_apart = rows(up)
    base, signs = base_factor(block)
    q, scale = empty(gate.shape, torch.int8), empty((*gate.shape[:-1], 1))
    launch(
        _gate, gates, apart, ups, up_apart, count, gate.shape[-1], block, base, signs, q, scale,
        work=2 * gate.numel() if count > 1 else 0,
    )  # fmt: skip
    return q, scale


@njit
def _take_largest(x, k, values, index):
    """The k largest of x, the first of those that are equal; they become minus infinity."""
    for j in range(k):
        best = 0
        for i in range(1, len(x)):
            if x[i] > x[best]:
                best = i
        values[j], index[j] = x[best], best
        x[best] = LOWEST


@kernel()
def _router(arguments, thread, threads):
    x, stride, count, n, k, values, index = arguments_at(arguments, 7)
    y = np.empty(n, np.float32)
    for row in share(count, thread, threads):
        scores = float32_at(x + 4 * row * stride, n)
        largest, total = scores[0], ZERO
        for i in range(n):
            largest = max(largest, scores[i])
        for i in range(n):
            y[i] = exp2((scores[i] - largest) * LOG2E)
            total += y[i]
        for i in range(n):
            y[i] /= total
        _take_largest(y, k, float32_at(values + 4 * row * k, k), int64_at(index + 8 * row * k, k))


def softmax_top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As ssmc::softmax_top_k: x [..., E] to (values [..., k], index int64 [..., k])."""
    if x.dtype != torch.float32 or not 0 < k <= x.shape[-1]:
        return run_torch(ops.softmax_top_k, x, k)
    given, count, apart = rows(x)
    values, index = empty((*x.shape[:-1], k)), empty((*x.shape[:-1], k), torch.int64)
    work = x.numel() * (k + 4) if count > 1 else 0
    launch(_router, given, apart, count, x.shape[-1], k, values, index, work=work)
    return values, index
