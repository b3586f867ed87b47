"""Rows of an int8 embedding in float32."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ssmc.kernels.cpu.kernel import kernel
from ssmc.kernels.cpu.launch import contiguous, empty, launch, vector
from ssmc.kernels.cpu.words import arguments_at, float32_at, int8_at, int64_at, share


@kernel()
def _embedding(arguments, thread, threads):
    ids, count, w, n, scale, by_row, out = arguments_at(arguments, 7)
    tokens = int64_at(ids, count)
    for i in share(count, thread, threads):
        token = tokens[i]
        row_scale = float32_at(scale + 4 * token * by_row, 1)[0]
        q, values = int8_at(w + token * n, n), float32_at(out + 4 * i * n, n)
        for j in range(n):
            values[j] = np.float32(q[j]) * row_scale


def int8_embedding(ids: Tensor, w_q: Tensor, w_scale: Tensor) -> Tensor:
    """As ssmc::int8_embedding, bit for bit: float32 [B, L, D]."""
    out = empty((*ids.shape, w_q.shape[1]))
    by_row = int(w_scale.numel() > 1)
    scale = vector(w_scale, w_scale.numel())
    launch(
        _embedding,
        contiguous(ids),
        ids.numel(),
        w_q,
        w_q.shape[1],
        scale,
        by_row,
        out,
        work=out.numel(),
    )
    return out
