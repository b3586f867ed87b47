"""Rows of an int8 table, in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels.launch import await_inputs, launch


@triton.jit
def _kernel(
    ids,
    w,
    w_scale,
    out,
    N,
    SCALE_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHAIN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    await_inputs(CHAIN)
    token = tl.load(ids + row).to(tl.int64)
    scale = tl.load(w_scale + token * SCALE_STRIDE)
    q = tl.load(w + token * N + n, mask=n < N)
    tl.store(out + row * N + n, q.to(tl.float32) * scale, mask=n < N)


def int8_embedding(
    ids: Tensor, w_q: Tensor, w_scale: Tensor, *, block_n: int = 1024, num_warps: int = 2
) -> Tensor:
    """Kernel of `ssmc.ops.int8_embedding`; ids of any shape, each in [0, V) (not checked)."""
    n = w_q.shape[1]
    out = torch.empty((*ids.shape, n), device=w_q.device)
    launch(
        _kernel,
        (ids.numel(), triton.cdiv(n, block_n)),
        ids.contiguous(),
        w_q.contiguous(),
        w_scale.contiguous(),
        out,
        n,
        device=w_q.device,
        SCALE_STRIDE=0 if w_scale.numel() == 1 else 1,
        BLOCK_N=block_n,
        num_warps=num_warps,
    )
    return out
