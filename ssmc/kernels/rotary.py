"""Rotary embeddings: pairs of channels turned by the token's position."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels.launch import await_inputs, launch


def rotary_embedding(
    x: Tensor, frequencies: Tensor, position: Tensor, scale: float = 1.0
) -> Tensor:
    """`ssmc.ops.rotary_embedding` on a GPU."""
    batch, length, heads, width = x.shape
    pairs = frequencies.shape[0]
    x = x.contiguous()
    y = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    rows = max(1, 1024 // block)
    grid = (batch * length, -(-heads // rows))
    launch(
        rotary_kernel, grid, x, frequencies, position, y, scale, length, heads, width, pairs,
        HEADS=rows, BLOCK=block, device=x.device, num_warps=4,
    )  # fmt: skip
    return y


@triton.jit
def rotary_kernel(
    x,
    frequencies,
    position,
    y,
    scale,
    L,
    H,
    P,
    R,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """Some heads of one token."""
    row, h = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    c = tl.arange(0, BLOCK)
    turned = c < 2 * R
    pair = tl.where(c < R, c, c - R)
    other = tl.where(c < R, c + R, c - R)
    frequency = tl.load(frequencies + pair, mask=turned, other=0.0)
    await_inputs(CHAIN)
    token = tl.load(position + row // L) + row % L
    angle = token.to(tl.float32) * frequency
    cos, sin = tl.cos(angle) * scale, tl.sin(angle) * scale
    mask = (h < H)[:, None] & (c < P)[None, :]
    at = (row * H + h)[:, None] * P
    mine = tl.load(x + at + c[None, :], mask=mask, other=0.0)
    its = tl.load(x + at + other[None, :], mask=mask & turned[None, :], other=0.0)
    sign = tl.where(c < R, -1.0, 1.0)
    result = mine * cos[None, :] + its * (sign * sin)[None, :]
    tl.store(y + at + c[None, :], tl.where(turned[None, :], result, mine), mask=mask)
