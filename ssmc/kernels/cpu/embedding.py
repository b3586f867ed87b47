"""Rows of an int8 embedding in float32."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ssmc.kernels.cpu.launch import contiguous, empty, kernel, launch, vector
from ssmc.kernels.cpu.words import float32_at, int8_at, int64_at


@kernel()
def _embedding(arguments, thread, threads):
    """ids, how many, weight, columns, scale, whether there is one a row, out."""
    a = int64_at(arguments, 7)
    n, ids = a[3], int64_at(a[0], a[1])
    for i in range(a[1] * thread // threads, a[1] * (thread + 1) // threads):
        scale = float32_at(a[4] + (4 * ids[i] if a[5] else 0), 1)[0]
        q, out = int8_at(a[2] + ids[i] * n, n), float32_at(a[6] + 4 * i * n, n)
        for j in range(n):
            out[j] = np.float32(q[j]) * scale


def int8_embedding(ids: Tensor, w_q: Tensor, w_scale: Tensor) -> Tensor:
    """As ssmc::int8_embedding, bit for bit: float32 [B, L, D]."""
    out = empty((*ids.shape, w_q.shape[1]))
    by_row = int(w_scale.numel() > 1)
    scale = vector(w_scale, w_scale.numel())
    launch(_embedding, contiguous(ids), ids.numel(), w_q, w_q.shape[1], scale, by_row, out)
    return out
