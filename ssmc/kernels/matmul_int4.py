"""Products with packed weights of 4 bits: W4A8 (integers within a group), and W4A16 (bfloat16)."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels.arithmetic import inverse_of
from ssmc.kernels.launch import INTERPRETED, await_inputs, launch, row_view
from ssmc.kernels.prefetch import prefetch_rows
from ssmc.kernels.tiles import (
    Tiling,
    load_vector,
    processors,
    row_scale,
    step,
    store_result,
    tile_of,
)

_INTERPRETED = tl.constexpr(INTERPRETED)
_OPERAND = tl.constexpr(tl.float32 if INTERPRETED else tl.bfloat16)  # it cannot multiply bfloat16
_FEW_ROWS = 8  # up to here a matrix product would waste most of its tile


def int4_linear(
    x: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    tiling: Tiling | None = None,
) -> Tensor:
    """`ssmc.ops.int4_linear` on a GPU."""
    y = torch.empty((*x.shape[:-1], w_q.shape[0]), dtype=torch.float32, device=x.device)
    if x.numel() <= _FEW_ROWS * x.shape[-1]:
        _few_rows(row_view(x), w_q, w_scale, bias, y, tiling)
    else:
        _product(row_view(x), None, w_q, w_scale, bias, None, None, y, tiling)
    return y


def w4a8_product(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    y: Tensor,
    tiling: Tiling | None = None,
) -> None:
    """`int8_linear` of packed w_q, and what follows it, into y [..., N] (contiguous).

    residual [..., N] is added if there is one; with out_scale [N] or [1], y is int8.
    """
    extra = None if residual is None else row_view(residual)
    _product(
        row_view(x_q), row_scale(x_scale, x_q), w_q, w_scale, bias, extra, out_scale, y, tiling
    )


def _pieces(w_q: Tensor, w_scale: Tensor, limit: int) -> dict[str, Any]:
    """Half a group, and the columns of it that are taken at once: a power of two from 32."""
    half = w_q.shape[1] // w_scale.shape[1]
    block = max(32, min(limit, triton.next_power_of_2(half)))
    return {"HALF": half, "BLOCK_H": block, "PIECES": triton.cdiv(half, block)}


@functools.cache
def choose_int4_tiling(m: int, n: int, count: int, element: int) -> Tiling:
    """The largest tile of the result that still gives each of `count` processors one.

    `element` is the size of one of x in bytes: the pipeline is as deep as fits.
    """
    height = max(16, min(128, triton.next_power_of_2(m)))
    while height > 64 and triton.cdiv(m, height) * triton.cdiv(n, 128) < count:
        height //= 2
    tiling = Tiling(height, 128, warps=8 if height > 64 else 4, stages=4 if element == 1 else 2)
    if triton.cdiv(m, height) * triton.cdiv(n, 128) < count:
        tiling = replace(tiling, block_n=64)
    return tiling


def _product(
    x: Tensor,
    x_scale: Tensor | None,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    y: Tensor,
    tiling: Tiling | None,
) -> None:
    (m, _), n = x.shape, w_q.shape[0]
    how = tiling or choose_int4_tiling(m, n, processors(x.device), x.element_size())
    launch(
        _int4_kernel,
        (triton.cdiv(m, how.block_m) * triton.cdiv(n, how.block_n),),
        x,
        x_scale,
        w_q.contiguous(),
        w_scale.contiguous(),
        bias,
        residual,
        out_scale,
        y,
        m,
        n,
        w_scale.shape[1],
        x.stride(0),
        0 if residual is None else residual.stride(0),
        **_pieces(w_q, w_scale, 64),
        BLOCK_M=how.block_m,
        BLOCK_N=how.block_n,
        GROUP=how.group,
        X_STEP=0 if x_scale is None else step(x_scale),
        OUT_STEP=0 if out_scale is None else step(out_scale),
        num_warps=how.warps,
        num_stages=how.stages,
        device=x.device,
    )


def _few_rows(
    x: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
    tiling: Tiling | None,
) -> None:
    groups = w_scale.shape[1]
    half = w_q.shape[1] // groups
    block_h = triton.next_power_of_2(half)
    how = tiling or Tiling(block_n=16, block_k=256, warps=4)
    launch(
        _int4_few_rows_kernel,
        (triton.cdiv(w_q.shape[0], how.block_n), x.shape[0]),
        x,
        w_q.contiguous(),
        w_scale.contiguous(),
        bias,
        y,
        w_q.shape[0],
        groups,
        x.stride(0),
        HALF=half,
        BLOCK_H=block_h,
        BLOCK_G=max(1, how.block_k // block_h),
        BLOCK_N=how.block_n,
        PREFETCH=w_q.shape[1] % 64 == 0 and w_q.data_ptr() % 16 == 0,
        num_warps=how.warps,
        device=x.device,
    )


@triton.jit
def unpack(packed):
    """The columns in the low and in the high four bits of bytes, as int8 from -8 to 7.

    Four bytes at a time: with its top bit set a byte holds q + 8 + 128, so taking 8 away borrows
    from no neighbour, and turning the top bit over leaves q in two's complement.
    """
    if _INTERPRETED:
        low = (packed & 15).to(tl.int8) - 8
        high = (packed >> 4).to(tl.int8) - 8
    else:
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 part;
            and.b32 part, $2, 0x0F0F0F0F;
            or.b32 part, part, 0x80808080;
            sub.s32 part, part, 0x08080808;
            xor.b32 $0, part, 0x80808080;
            shr.u32 part, $2, 4;
            and.b32 part, part, 0x0F0F0F0F;
            or.b32 part, part, 0x80808080;
            sub.s32 part, part, 0x08080808;
            xor.b32 $1, part, 0x80808080;
            }
            """,
            "=r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    return low, high


@triton.jit
def unpack_floats(packed):
    """As `unpack`, in float32.

    With a byte v below the pattern of 2^23 stands 2^23 + v: no conversion, which a slow unit does.
    """
    if _INTERPRETED:
        low = (packed & 15).to(tl.float32) - 8.0
        high = (packed >> 4).to(tl.float32) - 8.0
    else:
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 part;
            and.b32 part, $8, 0x0F0F0F0F;
            prmt.b32 $0, part, 0x4B000000, 0x7440;
            prmt.b32 $1, part, 0x4B000000, 0x7441;
            prmt.b32 $2, part, 0x4B000000, 0x7442;
            prmt.b32 $3, part, 0x4B000000, 0x7443;
            shr.u32 part, $8, 4;
            and.b32 part, part, 0x0F0F0F0F;
            prmt.b32 $4, part, 0x4B000000, 0x7440;
            prmt.b32 $5, part, 0x4B000000, 0x7441;
            prmt.b32 $6, part, 0x4B000000, 0x7442;
            prmt.b32 $7, part, 0x4B000000, 0x7443;
            }
            """,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [packed],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
        low -= 8388616.0
        high -= 8388616.0
    return low, high


@triton.jit
def to_bfloat16(x):
    """x rounded to bfloat16, half to even; the interpreter's conversion would cut off."""
    if _INTERPRETED:
        pattern = x.to(tl.int32, bitcast=True)
        pattern += 0x7FFF + ((pattern >> 16) & 1)
        x = (pattern & -65536).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def _int4_kernel(
    x,
    x_scale,
    w,
    w_scale,
    bias,
    residual,
    out_scale,
    y,
    M,
    N,
    GROUPS,
    x_stride,
    residual_stride,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    X_STEP: tl.constexpr,
    OUT_STEP: tl.constexpr,
    CHAIN: tl.constexpr,
):
    await_inputs(CHAIN)
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_line = x + tl.minimum(row, M - 1).to(tl.int64)[:, None] * x_stride
    known = tl.minimum(column, N - 1).to(tl.int64)
    w_line = w + known[:, None] * (GROUPS * HALF)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i in range(GROUPS * PIECES):
        group = i // PIECES
        inside = i % PIECES * BLOCK_H + tl.arange(0, BLOCK_H)
        x_address = x_line + (group * 2 * HALF + inside)[None, :]
        w_address = w_line + (group * HALF + inside)[None, :]
        if HALF % BLOCK_H == 0:
            packed = tl.load(w_address)
            x_low = tl.load(x_address)
            x_high = tl.load(x_address + HALF)
        else:
            mask = inside[None, :] < HALF
            packed = tl.load(w_address, mask=mask, other=0)
            x_low = tl.load(x_address, mask=mask, other=0)
            x_high = tl.load(x_address + HALF, mask=mask, other=0)
        low, high = unpack(packed)
        factor = tl.load(w_scale + known * GROUPS + group)
        if x_scale is None:
            part = tl.dot(low.to(_OPERAND), tl.trans(to_bfloat16(x_low).to(_OPERAND)))
            part = tl.dot(high.to(_OPERAND), tl.trans(to_bfloat16(x_high).to(_OPERAND)), part)
        else:
            part = tl.dot(low, tl.trans(x_low), out_dtype=tl.int32)
            part = tl.dot(high, tl.trans(x_high), part, out_dtype=tl.int32)
        total += part.to(tl.float32) * factor[:, None]
    value = tl.trans(total)
    if x_scale is not None:
        value = value * tl.load(x_scale + row * X_STEP, mask=row < M, other=1.0)[:, None]
    if bias is not None:
        value += tl.load(bias + column, mask=column < N, other=0.0)[None, :]
    inverse = None
    if out_scale is not None:
        inverse = inverse_of(load_vector(out_scale, column, N, OUT_STEP))
    store_result(value, row, column, M, N, residual, residual_stride, inverse, y)


@triton.jit
def _int4_few_rows_kernel(
    x,
    w,
    w_scale,
    bias,
    y,
    N,
    GROUPS,
    x_stride,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PREFETCH: tl.constexpr,
    CHAIN: tl.constexpr,
):
    left = tl.program_id(0) * BLOCK_N
    if PREFETCH:
        prefetch_rows(w, left, N, GROUPS * HALF, BLOCK_N, CHAIN)
    column = left + tl.arange(0, BLOCK_N)
    known = tl.minimum(column, N - 1).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    place = tl.arange(0, BLOCK_H)
    x_line = x + row * x_stride + place[None, :]
    w_line = w + known[:, None, None] * (GROUPS * HALF) + place[None, None]
    scale_line = w_scale + known[:, None] * GROUPS
    await_inputs(CHAIN)
    # Kept apart by place in the block until the end: one sum across threads instead of one a block.
    total = tl.zeros((BLOCK_N, BLOCK_G, BLOCK_H), tl.float32)
    for start in range(0, GROUPS, BLOCK_G):
        this = start + group
        known_group = this < GROUPS
        # What stands for a group that does not exist is no matter: its factor is 0.
        w_address = w_line + tl.minimum(this, GROUPS - 1)[None, :, None] * HALF
        if HALF == BLOCK_H:
            packed = tl.load(w_address)
        else:
            packed = tl.load(w_address, mask=place[None, None] < HALF, other=0)
        factor = tl.load(scale_line + this[None, :], mask=known_group[None, :], other=0.0)
        address = x_line + this[:, None] * (2 * HALF)
        mask = known_group[:, None] & (place < HALF)[None, :]
        x_low = to_bfloat16(tl.load(address, mask=mask, other=0.0)).to(tl.float32)
        x_high = to_bfloat16(tl.load(address + HALF, mask=mask, other=0.0)).to(tl.float32)
        low, high = unpack_floats(packed)
        part = tl.fma(tl.broadcast_to(x_high[None], high.shape), high, x_low[None] * low)
        total = tl.fma(part, tl.broadcast_to(factor[:, :, None], part.shape), total)
    value = tl.sum(tl.sum(total, 2), 1)
    if bias is not None:
        value += tl.load(bias + column, mask=column < N, other=0.0)
    tl.store(y + row * N + column, value, mask=column < N)
