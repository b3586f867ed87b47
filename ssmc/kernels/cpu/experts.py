"""int8 products of each token with the weights of the experts it has chosen."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ssmc import ops
from ssmc.kernels.cpu.launch import contiguous, empty, kernel, launch, rows, run_torch, vector
from ssmc.kernels.cpu.linear import copy_rows
from ssmc.kernels.cpu.products import rows_product
from ssmc.kernels.cpu.vectors import ROWS
from ssmc.kernels.cpu.words import arguments_at, float32_at, int64_at, keep, share


@kernel()
def _experts(arguments, thread, threads):
    (
        x, stride, x_scale, choices, each, w, w_scale, experts, n, k, index, count, out,
    ) = arguments_at(arguments, 13)  # fmt: skip
    blocks, steps = (n + ROWS - 1) // ROWS, (k + 63) // 64
    wide, cells = steps * 64, experts * n * k
    padded, whole = np.zeros(wide, np.int8), np.zeros(ROWS * wide, np.int8)
    sums, chosen, scales = (
        np.empty(ROWS, np.int32),
        int64_at(index, count),
        float32_at(w_scale, experts * n),
    )
    for unit in share(count * blocks, thread, threads):
        row, begin = unit // blocks, unit % blocks * ROWS
        token, first = row if each else row // choices, chosen[row] * n + begin
        size, source, apart = min(ROWS, n - begin), w + first * k, k
        copy_rows(x + token * stride, stride, 1, k, padded.ctypes.data, wide)
        if (first + size - 1) * k + wide > cells:  # the weight would be read beyond its end
            copy_rows(source, k, size, k, whole.ctypes.data, wide)
            source, apart = whole.ctypes.data, wide
        rows_product(sums.ctypes.data, padded.ctypes.data, source, apart, size, steps)
        factor = np.float64(float32_at(x_scale, token + 1)[token])
        y = float32_at(out + 4 * (row * n + begin), size)
        for i in range(size):
            y[i] = np.float32(np.float64(sums[i]) * (factor * np.float64(scales[first + i])))
    keep(padded)
    keep(whole)


def int8_expert_linear(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, index: Tensor
) -> Tensor:
    """As ssmc::int8_expert_linear, bit for bit: float32 [B, L, k, N]."""
    experts, n, k = w_q.shape
    x, count, apart = rows(x_q)
    if x_scale.numel() not in (1, count) or w_scale.numel() not in (1, experts * n):
        return run_torch(ops.int8_expert_linear, x_q, x_scale, w_q, w_scale, index)
    out = empty((*index.shape, n))
    launch(
        _experts, x, apart, vector(x_scale, count), index.shape[-1], int(x_q.dim() == 4),
        contiguous(w_q), vector(w_scale, experts * n), experts, n, k, contiguous(index),
        index.numel(), out, work=index.numel() * n * k // 8,
    )  # fmt: skip
    return out
