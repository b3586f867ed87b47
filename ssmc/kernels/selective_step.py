"""One step of Mamba's mixer between x_proj and out_proj: dt_proj, state update and gate.

The kernel here is for few sequences, and for a weight of 4 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels.arithmetic import (
    LOG2E,
    inverse_of,
    parameter,
    scale_for,
    silu,
    softplus,
    times_scale,
    to_int8,
)
from ssmc.kernels.launch import await_inputs, launch, let_next_load
from ssmc.kernels.prefetch import prefetch
from ssmc.kernels.selective_steps import DEEPEST, FEWEST, run_steps


@triton.jit
def _quantised(x, mask):
    """Rows of x and a scale for each: (int8 [S, K], scale [S, 1]), as `quantize_dynamic`."""
    values = tl.load(x, mask=mask, other=0.0)
    scale = scale_for(tl.max(tl.abs(values), 1))[:, None]
    return to_int8(values, inverse_of(scale)), scale


@triton.jit
def _products(x, w):
    """int32 [S, D] of int8 x [S, K] and w [D, K], of few rows: without the tensor cores."""
    return tl.sum(x.to(tl.int32)[:, None, :] * w.to(tl.int32)[None, :, :], 2)


@triton.jit
def _halves(low, high, w, scale, GROUP: tl.constexpr):
    """float64 [S, D] of a weight packed in groups: bytes w [D, K/2], its scale [D, K/GROUP].

    low, high int8 [S, K/2] are the columns that the low and the high four bits of a byte belong to.
    """
    even = (w & 15).to(tl.int32) - 8
    odd = (w >> 4).to(tl.int32) - 8
    products = low.to(tl.int32)[:, None, :] * even[None, :, :]
    products += high.to(tl.int32)[:, None, :] * odd[None, :, :]
    S: tl.constexpr = low.shape[0]
    D: tl.constexpr = w.shape[0]
    HALF: tl.constexpr = GROUP // 2
    groups = tl.sum(tl.reshape(products, (S, D, w.shape[1] // HALF, HALF)), 3)
    return tl.sum(groups.to(tl.float64) * scale.to(tl.float64)[None, :, :], 2)


@triton.jit
def _step_kernel(
    x_proj,
    dt_w_q,
    dt_w_scale,
    dt_proj_bias,
    dt_scale,
    u_q,
    u_scale,
    A,
    D,
    z_q,
    z_scale,
    dt_bias,
    state,
    y,
    batch,
    width,
    rank,
    states,
    x_row,
    u_row,
    z_row,
    dt_w_scale_stride,
    dt_scale_stride,
    u_scale_stride,
    z_scale_stride,
    GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """BLOCK_D channels of S sequences. GROUP is 0, or the columns a scale of a packed weight.

    The weight and all that belongs to a channel are read before the inputs are waited for, and the
    state, which may not be read so early, is brought into the L2 cache.
    """
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    sequence = tl.program_id(1) * S + tl.arange(0, S)
    kept = channel < width
    n = tl.arange(0, N)
    inside = kept[:, None] & (n < states)[None, :]
    cell = channel[:, None] * states + n[None, :]
    row = tl.minimum(sequence, batch - 1).to(tl.int64)[:, None]
    if CHAIN:
        # Two sectors of 32 bytes are the 16 float32 states of a channel.
        own = state + (row * width + tl.minimum(channel, width - 1)[None, :]) * states
        prefetch(own)
        prefetch(own + states // 2)
    if GROUP == 0:
        k = tl.arange(0, R)
        w_at = channel.to(tl.int64)[:, None] * rank + k[None, :]
        w = tl.load(dt_w_q + w_at, mask=kept[:, None] & (k < rank)[None, :], other=0)
        w_scale = parameter(dt_w_scale, dt_w_scale_stride, channel, width)
    else:
        k = tl.arange(0, R // 2)
        w_at = channel.to(tl.int64)[:, None] * (rank // 2) + k[None, :]
        w = tl.load(dt_w_q + w_at, mask=kept[:, None] & (k < rank // 2)[None, :], other=136)
        group = tl.arange(0, R // GROUP)
        scale_at = channel[:, None] * (rank // GROUP) + group[None, :]
        scale_kept = kept[:, None] & (group < rank // GROUP)[None, :]
        w_scale = tl.load(dt_w_scale + scale_at, mask=scale_kept, other=0.0)
    dt_s = parameter(dt_scale, dt_scale_stride, channel, width)
    u_s = parameter(u_scale, u_scale_stride, channel, width)
    z_s = parameter(z_scale, z_scale_stride, channel, width)
    proj_bias = parameter(dt_proj_bias, 1, channel, width)
    bias = parameter(dt_bias, 1, channel, width)
    skip = parameter(D, 1, channel, width)
    rate = tl.load(A + cell, mask=inside, other=0.0)
    let_next_load(CHAIN)
    await_inputs(CHAIN)

    there = sequence < batch
    at = row * width + channel[None, :]
    mask = there[:, None] & kept[None, :]
    old = state + row[:, :, None] * (width * states) + cell[None, :, :]
    old_mask = there[:, None, None] & inside[None, :, :]
    h = tl.load(old, mask=old_mask, other=0.0).to(tl.float32)
    u = tl.load(u_q + row * u_row + channel[None, :], mask=mask, other=0).to(tl.float32)
    u *= u_s[None, :]
    x = x_proj + row * x_row
    token = there[:, None] & (n < states)[None, :]
    B_q, B_s = _quantised(x + rank + n[None, :], token)
    C_q, C_s = _quantised(x + rank + states + n[None, :], token)
    if GROUP == 0:
        low_q, low_s = _quantised(x + k[None, :], there[:, None] & (k < rank)[None, :])
        dt = times_scale(_products(low_q, w), low_s * w_scale[None, :])
    else:
        column = k // (GROUP // 2) * GROUP + k % (GROUP // 2)
        known = there[:, None] & (k < rank // 2)[None, :]
        first = tl.load(x + column[None, :], mask=known, other=0.0)
        second = tl.load(x + column[None, :] + GROUP // 2, mask=known, other=0.0)
        low_s = scale_for(tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 1))[:, None]
        inverse = inverse_of(low_s)
        total = _halves(to_int8(first, inverse), to_int8(second, inverse), w, w_scale, GROUP)
        dt = (total * low_s.to(tl.float64)).to(tl.float32)
    if dt_proj_bias is not None:
        dt += proj_bias[None, :]
    dt = to_int8(dt, inverse_of(dt_s)[None, :]).to(tl.float32) * dt_s[None, :] + bias[None, :]
    if SOFTPLUS:
        dt = softplus(dt)

    decay = tl.exp2(dt[:, :, None] * (rate * LOG2E)[None, :, :])
    B = B_q.to(tl.float32) * B_s
    C = C_q.to(tl.float32) * C_s
    h = tl.fma(decay, h, (dt * u)[:, :, None] * B[:, None, :])
    tl.store(old, h.to(state.dtype.element_ty), mask=old_mask)
    out = tl.sum(h * C[:, None, :], 2)
    if D is not None:
        out += u * skip[None, :]
    if z_q is not None:
        z = tl.load(z_q + row * z_row + channel[None, :], mask=mask, other=0).to(tl.float32)
        out *= silu(z * z_s[None, :])
    tl.store(y + at, out, mask=mask)


def selective_scan_step(
    x_proj: Tensor,
    dt_w_q: Tensor,
    dt_w_scale: Tensor,
    dt_proj_bias: Tensor | None,
    dt_scale: Tensor,
    u_q: Tensor,
    u_scale: Tensor,
    A: Tensor,
    D: Tensor | None,
    z_q: Tensor | None,
    z_scale: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    softplus: bool,
    *,
    block_d: int | None = None,
    sequences: int | None = None,
    num_warps: int = 4,
) -> tuple[Tensor, Tensor]:
    """`ssmc.ops.steps.selective_scan_step`; the new state is written over `state`, contiguous.

    x_proj [B, 1, R + 2 N] and u_q, z_q [B, 1, D] may be views of wider rows. A program takes
    `block_d` channels of `sequences` (powers of two). With 16 of both and more, and a weight of 8
    bits, it is the kernel of `ssmc.kernels.selective_steps`.
    """
    batch, _, width = u_q.shape
    states, rank = A.shape[1], x_proj.shape[-1] - 2 * A.shape[1]
    packed = dt_w_q.dtype == torch.uint8
    group = rank // dt_w_scale.shape[1] if packed else 0
    by_matrices = not packed and rank <= DEEPEST
    sequences = sequences or (FEWEST if by_matrices and batch >= FEWEST else 1)
    by_matrices &= sequences >= FEWEST
    block_d = block_d or (32 if by_matrices else 16)
    y = torch.empty((batch, 1, width), dtype=torch.float32, device=u_q.device)
    operands = (
        *(x_proj, dt_w_q, dt_w_scale, dt_proj_bias, dt_scale, u_q, u_scale, A, D),
        *(z_q, z_scale, dt_bias),
    )
    sizes = (batch, width, rank, states)
    strides = (
        *(x_proj.stride(0), u_q.stride(0), 0 if z_q is None else z_q.stride(0)),
        *(min(dt_w_scale.dim(), 1), dt_scale.dim(), u_scale.dim()),
        0 if z_scale is None else z_scale.dim(),
    )
    if by_matrices and block_d >= FEWEST:
        run_steps(operands, state, y, sizes, strides, softplus, sequences, block_d, num_warps)
        return y, state
    launch(
        _step_kernel,
        (triton.cdiv(width, block_d), triton.cdiv(batch, sequences)),
        *(*operands, state, y, *sizes, *strides),
        device=u_q.device,
        GROUP=group,
        SOFTPLUS=softplus,
        S=sequences,
        R=triton.next_power_of_2(max(rank, 32)),
        N=triton.next_power_of_2(states),
        BLOCK_D=block_d,
        num_warps=num_warps,
    )
    return y, state
