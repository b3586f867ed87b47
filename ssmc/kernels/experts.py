"""int8 products of tokens with the weights of the experts that each has chosen.

For few choices a program takes one of them and some rows of its expert's weight. For many, choices
are sorted by expert on the device, and a program makes a tile of the result of one expert: which
one, and of which rows, it reads from the counts. So nothing waits for the device, and a recorded
call serves any choice. The grid is as large as tiles can be many: one for each whole block of
choices, and one more for each expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels.arithmetic import times_scale
from ssmc.kernels.launch import await_inputs, launch
from ssmc.ops.experts import check_experts

FEW = 16
"""Choices up to which each has programs of its own."""


def int8_expert_linear(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, index: Tensor
) -> Tensor:
    """`ssmc.ops.int8_expert_linear` on a GPU."""
    check_experts("int8_expert_linear", x_q, w_q, index)
    experts, rows, width = w_q.shape
    choices, each = index.numel(), index.shape[-1]
    shared = each if x_q.dim() == 3 else 1  # choices that read the same row of x
    y = torch.empty((*index.shape, rows), dtype=torch.float32, device=index.device)
    x_scale = x_scale.expand(*x_q.shape[:-1], 1).contiguous()
    w_scale = w_scale.expand(experts, rows, 1).contiguous()
    x_q, w_q, index = x_q.contiguous(), w_q.contiguous(), index.contiguous()
    if choices <= FEW:
        launch(
            vector_kernel, (choices, -(-rows // 16)), x_q, x_scale, w_q, w_scale, index, y,
            rows, width, shared, BLOCK_N=16, BLOCK_K=256, device=index.device, num_warps=4,
        )  # fmt: skip
        return y
    order = index.flatten().argsort(stable=True)
    counts = torch.zeros(experts, dtype=torch.int64, device=index.device)
    counts.scatter_add_(0, index.flatten(), torch.ones_like(order))
    block_m, block_n, block_k = 64, 128, 64
    ends = counts.cumsum(0)
    tiles = torch.div(counts + block_m - 1, block_m, rounding_mode="floor").cumsum(0)
    grid = (choices // block_m + min(experts, choices), -(-rows // block_n))
    launch(
        tile_kernel, grid, x_q, x_scale, w_q, w_scale, order, counts, ends, tiles, y,
        experts, rows, width, shared,
        EXPERTS=triton.next_power_of_2(experts), BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_K=block_k, device=index.device, num_warps=4, num_stages=4,
    )  # fmt: skip
    return y


@triton.jit
def vector_kernel(
    x,
    x_scale,
    w,
    w_scale,
    index,
    y,
    N,
    K,
    SHARED,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """One choice: some rows of the weight of its expert."""
    choice, n = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    await_inputs(CHAIN)
    expert = tl.load(index + choice)
    row = expert * N + n
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    for first in range(0, K, BLOCK_K):
        inside = first + k < K
        value = tl.load(x + (choice // SHARED).to(tl.int64) * K + first + k, mask=inside, other=0)
        mask = (n < N)[:, None] & inside[None, :]
        weight = tl.load(w + row[:, None] * K + (first + k)[None, :], mask=mask, other=0)
        total += weight.to(tl.int32) * value.to(tl.int32)[None, :]
    scale = tl.load(x_scale + choice // SHARED) * tl.load(w_scale + row, mask=n < N, other=0.0)
    result = times_scale(tl.sum(total, 1), scale)
    tl.store(y + choice.to(tl.int64) * N + n, result, mask=n < N)


@triton.jit
def tile_kernel(
    x,
    x_scale,
    w,
    w_scale,
    order,
    counts,
    ends,
    tiles,
    y,
    E,
    N,
    K,
    SHARED,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """One tile of the result of one expert; the last programs have none."""
    tile, n = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k, e = tl.arange(0, BLOCK_K), tl.arange(0, EXPERTS)
    await_inputs(CHAIN)
    up_to = tl.load(tiles + e, mask=e < E, other=2**31)
    expert = tl.sum((up_to <= tile).to(tl.int32), 0)  # those whose tiles are all in front
    if expert < E:
        end, count = tl.load(ends + expert), tl.load(counts + expert)
        before = tl.load(tiles + expert) - tl.cdiv(count, BLOCK_M)
        place = end - count + (tile - before) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = place < end
        choice = tl.load(order + place, mask=inside, other=0)
        row = expert.to(tl.int64) * N + n
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for first in range(0, K, BLOCK_K):
            deep = first + k < K
            value = tl.load(
                x + (choice // SHARED)[:, None] * K + (first + k)[None, :],
                mask=inside[:, None] & deep[None, :],
                other=0,
            )
            weight = tl.load(
                w + row[None, :] * K + (first + k)[:, None],
                mask=(n < N)[None, :] & deep[:, None],
                other=0,
            )
            total = tl.dot(value, weight, total, out_dtype=tl.int32)
        mask = inside[:, None] & (n < N)[None, :]
        mine = tl.load(x_scale + choice // SHARED, mask=inside, other=0.0)
        scale = mine[:, None] * tl.load(w_scale + row, mask=n < N, other=0.0)[None, :]
        tl.store(y + choice[:, None] * N + n[None, :], times_scale(total, scale), mask=mask)
