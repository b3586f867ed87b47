"""Decoding's linear layers: a weight times a few rows, and what makes the rows in front of it.

A program multiplies BLOCK_N rows of the weight. It has all of them in registers before it waits for
the kernel in front, so that this traffic, which is most of what decoding costs, does not wait. Then
it makes the int8 row itself, as all programs do: that takes about as long as one launch would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels import matmul, matvec_int4
from ssmc.kernels.launch import await_inputs, launch, let_next_load, row_view
from ssmc.kernels.matvec_tiles import (
    load_bias,
    load_group_scales,
    load_residual,
    load_weight,
    load_words,
    parts_of,
    product,
    quantized,
)
from ssmc.kernels.norm import rms_norm_quantize
from ssmc.kernels.pieces import load_pieces, normed

MAX_ROWS = 8
"""Most rows that one kernel serves: each is a pass of its own over the weight in registers."""
WORD = 4
"""int8 values in an int32: pieces of a row are whole words."""
PROGRAMS = 132
"""Programs wanted at least: the multiprocessors of an H200."""
TILE_BYTES = 40 * 1024
"""Most bytes of the weight that a program holds: three programs fill a multiprocessor."""


@dataclass(frozen=True)
class Matvec:
    """How a weight [N, width] is cut into the tiles of programs.

    `group` is the size of a weight's groups of 4 bits, 0 for int8. A part of `parts` has `columns`
    words side by side. Rows of a program, warps and the limit of registers change no bit.
    """

    width: int
    parts: tuple[int, ...]
    group: int
    columns: int
    block_n: int
    warps: int
    maxnreg: int | None

    def constants(self) -> dict[str, Any]:
        """The compile-time arguments of a kernel that calls `load_constants`."""
        return {
            "K": self.width,
            "PARTS": self.parts,
            "GROUP": self.group,
            "COLUMNS": self.columns,
            "BLOCK_N": self.block_n,
            "num_warps": self.warps,
            "num_stages": 1,
            "maxnreg": self.maxnreg,
        }


def matvec(
    w_q: Tensor,
    w_scale: Tensor,
    rows: int,
    piece: int = 1,
    block_n: int | None = None,
    num_warps: int | None = None,
    maxnreg: int | None = None,
) -> Matvec | None:
    """The tiles of a weight; None where the batched kernels serve better, or only they can.

    Those take more than MAX_ROWS rows, and weights that are no whole, aligned words. The parts are
    multiples of `piece`, a power of two.
    """
    n, row_bytes = w_q.shape
    width, group = row_bytes, 0
    if w_q.dtype == torch.uint8:
        width = 2 * row_bytes
        group = width // w_scale.shape[1]
    aligned = row_bytes % 4 == 0 and w_q.storage_offset() % 4 == 0 and w_q.is_contiguous()
    if rows > MAX_ROWS or not aligned or group & (group - 1) or 0 < group < 8:
        return None
    parts = parts_of(width, max(128, piece, group))
    held = sum(parts) if group == 0 else sum(parts) // 2
    block_n = block_n or _block_n(n, held)
    warps = num_warps or (8 if block_n * held > TILE_BYTES else min(4, block_n))
    columns = min(128, min(parts) // (8 if group else 4))
    # Two programs of eight warps have 128 registers a thread.
    registers = maxnreg or (128 if warps == 8 else None)
    return Matvec(width, parts, group, columns, block_n, warps, registers)


def _block_n(n: int, row_bytes: int) -> int:
    """The largest power of two of rows that leaves enough programs and enough registers.

    At least two: each is a warp's own, so that its sum takes no barrier, and of a weight with few
    rows, which is multiplied while the memory brings larger ones, little is left to wait for.
    """
    block_n = 2
    while 2 * block_n * row_bytes <= TILE_BYTES and n >= 2 * block_n * PROGRAMS:
        block_n *= 2
    return block_n


def piece_of(width: int) -> int:
    """The width of the pieces in which a row is normed: a divisor, within 128 to 512 values."""
    return min(512, max(128, width & -width))


def _words(q: Tensor) -> Tensor:
    """Bytes [rows, width] as int32 [rows, width / 4]."""
    return q.view(torch.int32)


def _in_words(q: Tensor) -> bool:
    """Whether the rows of int8 [rows, width] begin where words do."""
    return q.storage_offset() % WORD == 0 and q.stride(0) % WORD == 0


def _step(scale: Tensor) -> int:
    return 0 if scale.numel() == 1 else 1


@triton.jit
def load_constants(
    w,
    w_scale,
    w_scale_step,
    n,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What a program knows before its inputs: the weight's rows n and their scales."""
    if GROUP == 0:
        weight = load_weight(w, n, PARTS, K, 4, COLUMNS)
        scales = tl.load(w_scale + n * w_scale_step)
    else:
        weight = load_weight(w, n, PARTS, K, 8, COLUMNS)
        scales = load_group_scales(w_scale, n, PARTS, K, GROUP, COLUMNS)
    return weight, scales


@triton.jit
def _linear_kernel(
    x,
    x_stride,
    x_scale,
    x_scale_step,
    rows,
    w,
    w_scale,
    w_scale_step,
    bias,
    residual,
    residual_stride,
    out,
    N,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHAIN: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    held = tl.minimum(n, N - 1)
    b = load_bias(bias, held)
    weight, scales = load_constants(w, w_scale, w_scale_step, held, K, PARTS, GROUP, COLUMNS)
    let_next_load(CHAIN)
    await_inputs(CHAIN)
    for row in range(rows):
        scale = tl.load(x_scale + row * x_scale_step)
        before = load_residual(residual, residual_stride, row, held)
        words = load_words(x + row * x_stride, PARTS, K)
        y = before + (product(weight, scales, words, scale, GROUP) + b)
        tl.store(out + row * N + n, y, mask=n < N)


@triton.jit
def _norm_kernel(
    x,
    x_stride,
    norm_weight,
    eps,
    rows,
    w,
    w_scale,
    w_scale_step,
    bias,
    out,
    N,
    PIECE: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHAIN: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    held = tl.minimum(n, N - 1)
    norm_weights = load_norm(norm_weight, K, PIECE)
    b = load_bias(bias, held)
    weight, scales = load_constants(w, w_scale, w_scale_step, held, K, PARTS, GROUP, COLUMNS)
    let_next_load(CHAIN)
    await_inputs(CHAIN)
    for row in range(rows):
        pieces = load_pieces(x + row * x_stride, K, PIECE)
        pieces, largest = normed(pieces, norm_weights, eps, K)
        words, scale = quantized(pieces, largest, PARTS)
        y = product(weight, scales, words, scale, GROUP) + b
        tl.store(out + row * N + n, y, mask=n < N)


@triton.jit
def load_norm(norm_weight, K: tl.constexpr, PIECE: tl.constexpr):
    """The weights of a norm in pieces, or nothing where it has none."""
    if norm_weight is None:
        return ()
    else:
        return load_pieces(norm_weight, K, PIECE)


def int8_linear(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    block_n: int | None = None,
    num_warps: int | None = None,
    maxnreg: int | None = None,
) -> Tensor:
    """Kernel of `ssmc.ops.int8_linear`; that of `ssmc.kernels.matmul` where `matvec` is None."""
    how = matvec(w_q, w_scale, _rows(x_q), 1, block_n, num_warps, maxnreg)
    if how is None:
        return matmul.int8_linear(x_q, x_scale, w_q, w_scale, bias)
    return _linear(x_q, x_scale, w_q, w_scale, bias, None, how)


def int8_linear_add(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    block_n: int | None = None,
    num_warps: int | None = None,
    maxnreg: int | None = None,
) -> Tensor:
    """Kernel of `ssmc.ops.int8_linear_add`; falls back as `int8_linear`."""
    how = matvec(w_q, w_scale, _rows(x_q), 1, block_n, num_warps, maxnreg)
    if how is None:
        return matmul.int8_linear_add(x_q, x_scale, w_q, w_scale, bias, residual)
    return _linear(x_q, x_scale, w_q, w_scale, bias, residual, how)


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _linear(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    how: Matvec,
) -> Tensor:
    x, n = row_view(x_q), w_q.shape[0]
    words = _words(x if _in_words(x) else x.clone(memory_format=torch.contiguous_format))
    before = None if residual is None else row_view(residual)
    out = torch.empty((*x_q.shape[:-1], n), device=x.device)
    held = matvec_int4.held(w_q, w_scale)
    launch(
        matvec_int4.linear_kernel if held else _linear_kernel,
        (triton.cdiv(n, held.rows if held else how.block_n),),
        words,
        words.stride(0),
        x_scale,
        _step(x_scale),
        x.shape[0],
        matvec_int4.descriptor(w_q, held) if held else _words(w_q),
        w_scale,
        _step(w_scale),
        bias,
        before,
        0 if before is None else before.stride(0),
        out,
        n,
        device=x.device,
        **(held or how).constants(),
    )
    return out


def norm_linear_step(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    *,
    block_n: int | None = None,
    num_warps: int | None = None,
    maxnreg: int | None = None,
) -> Tensor:
    """Kernel of `ssmc.ops.norm_linear_step`; two kernels where `matvec` has no tiles."""
    flat = row_view(x)
    m, n = flat.shape[0], w_q.shape[0]
    piece = piece_of(x.shape[-1])
    how = matvec(w_q, w_scale, m, piece, block_n, num_warps, maxnreg)
    if how is None:
        return int8_linear(*rms_norm_quantize(x, norm_weight, eps), w_q, w_scale, bias)
    out = torch.empty((*x.shape[:-1], n), device=x.device)
    launch(
        _norm_kernel,
        (triton.cdiv(n, how.block_n),),
        flat,
        flat.stride(0),
        norm_weight,
        eps,
        m,
        _words(w_q),
        w_scale,
        _step(w_scale),
        bias,
        out,
        n,
        device=x.device,
        PIECE=piece,
        **how.constants(),
    )
    return out
