"""float32 to int8, with a static scale or one a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels.arithmetic import inverse_of, scale_for, to_int8, to_int8_within
from ssmc.kernels.launch import await_inputs, launch, row_view


@triton.jit
def _static_kernel(
    x,
    x_stride,
    scale,
    q,
    M,
    N,
    SCALE_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHAIN: tl.constexpr,
):
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inverse = inverse_of(tl.load(scale + n * SCALE_STRIDE, mask=n < N, other=1.0))
    await_inputs(CHAIN)
    inside = (m < M) & (n < N)
    tl.store(q + m * N + n, to_int8(tl.load(x + m * x_stride + n, mask=inside), inverse), inside)


def quantize(
    x: Tensor,
    scale: Tensor,
    bits: int = 8,
    *,
    block_m: int = 8,
    block_n: int = 512,
    num_warps: int = 4,
) -> Tensor:
    """Kernel of `ssmc.ops.quantize`.

    The operator's own definition runs where `bits` is not 8, and for a scale that broadcasts
    otherwise than as [] or over the last dimensions.
    """
    shared = scale.numel() == 1
    if bits != 8 or not (shared or scale.shape == x.shape[x.dim() - scale.dim() :]):
        return torch.ops.ssmc.quantize(x, scale, bits)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    n = x.shape[-1] if shared else scale.numel()
    flat = row_view(x.reshape(-1, n))
    launch(
        _static_kernel,
        (triton.cdiv(len(flat), block_m), triton.cdiv(n, block_n)),
        flat,
        flat.stride(0),
        scale if shared else scale.contiguous(),
        q,
        len(flat),
        n,
        device=x.device,
        SCALE_STRIDE=0 if shared else 1,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=num_warps,
    )
    return q


@triton.jit
def _dynamic_kernel(
    x,
    x_stride,
    q,
    scale,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHAIN: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = row[:, None].to(tl.int64)
    n = tl.arange(0, BLOCK_N)[None, :]
    inside = (m < M) & (n < N)
    await_inputs(CHAIN)
    values = tl.load(x + m * x_stride + n, mask=inside, other=0.0)
    scales = scale_for(tl.max(tl.abs(values), 1))
    tl.store(scale + row, scales, mask=row < M)
    tl.store(q + m * N + n, to_int8_within(values, inverse_of(scales)[:, None]), mask=inside)


def quantize_dynamic(
    x: Tensor, bits: int = 8, *, num_warps: int | None = None
) -> tuple[Tensor, Tensor]:
    """Kernel of `ssmc.ops.quantize_dynamic`; other `bits` than 8 run the operator's definition."""
    if bits != 8:
        return torch.ops.ssmc.quantize_dynamic(x, bits)
    flat = row_view(x)
    m, n = flat.shape
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), device=x.device)
    block_n = triton.next_power_of_2(n)
    block_m = max(1, 1024 // block_n)
    launch(
        _dynamic_kernel,
        (triton.cdiv(m, block_m),),
        flat,
        flat.stride(0),
        q,
        scale,
        m,
        n,
        device=x.device,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=num_warps or min(8, max(1, block_m * block_n // 512)),
    )
    return q, scale
