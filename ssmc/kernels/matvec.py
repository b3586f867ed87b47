"""Decoding's linear layers: a weight times a few rows, and what makes the rows in front of it.

A program multiplies BLOCK_N rows of the weight. It has all of them in registers before it waits for
the kernel in front, so that this traffic, which is most of what decoding costs, does not wait. Then
it makes the int8 row itself, as all programs do: that takes about as long as one launch would.
"""

# Tuples of pieces grow in loops that Triton unrolls; it knows no starred expressions.
# ruff: noqa: RUF005, SIM108
# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels.arithmetic import inverse_rms, silu, to_float
from ssmc.kernels.hadamard import Rotation, plan
from ssmc.kernels.launch import await_inputs, launch, row_view
from ssmc.kernels.matvec_tiles import (
    load_group_scales,
    load_weight,
    load_words,
    parts_of,
    product,
    quantized,
    rotated,
)
from ssmc.kernels.pieces import load_pieces

MAX_ROWS = 8
"""Most rows that one kernel serves: each is a pass of its own over the weight in registers."""
WORD = 4
"""int8 values in an int32: pieces of a row are whole words."""
PROGRAMS = 132
"""Programs wanted at least: the multiprocessors of an H200."""
TILE_BYTES = 40 * 1024
"""Most bytes of the weight that a program holds: three programs fill a multiprocessor."""
ROTATED_TILE_BYTES = 160 * 1024
"""The same where a long row is rotated first: so much work that few programs, one for each
multiprocessor, shall do it."""
LONG_ROW = 2048
"""Rows longer than this are rotated by few programs."""
ROTATED_ROWS = 2
"""Most rows whose rotation programs repeat; beyond, it is a kernel of its own."""


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
    rotated: bool = False,
    block_n: int | None = None,
    num_warps: int | None = None,
    maxnreg: int | None = None,
) -> Matvec | None:
    """The tiles of a weight; None where the batched kernels serve better, or only they can.

    Those take more than MAX_ROWS rows, and weights that are no whole, aligned words. The parts are
    multiples of `piece`, a power of two. `rotated` says that programs rotate the row first.
    """
    n, row_bytes = w_q.shape
    width, group = row_bytes, 0
    if w_q.dtype == torch.uint8:
        width = 2 * row_bytes
        group = width // w_scale.shape[1]
    aligned = row_bytes % 4 == 0 and w_q.storage_offset() % 4 == 0 and w_q.is_contiguous()
    if (
        rows > (ROTATED_ROWS if rotated else MAX_ROWS)
        or not aligned
        or group & (group - 1)
        or 0 < group < 8
    ):
        return None
    parts = parts_of(width, max(128, piece, group))
    held = sum(parts) if group == 0 else sum(parts) // 2
    long = rotated and width > LONG_ROW
    most, programs = (ROTATED_TILE_BYTES, PROGRAMS // 2) if long else (TILE_BYTES, PROGRAMS)
    block_n = block_n or _block_n(n, held, most, programs)
    warps = num_warps or (8 if long or block_n * held > TILE_BYTES else 4)
    columns = min(128, min(parts) // (8 if group else 4))
    # Two programs of eight warps have 128 registers a thread, one of a long row has 255.
    registers = maxnreg or ((255 if long else 128) if warps == 8 else None)
    return Matvec(width, parts, group, columns, block_n, warps, registers)


def _block_n(n: int, row_bytes: int, most: int, programs: int) -> int:
    """The largest power of two of rows that leaves enough programs and enough registers."""
    block_n = 1
    while 2 * block_n * row_bytes <= most and n >= 2 * block_n * programs:
        block_n *= 2
    return block_n


def piece_of(width: int) -> int:
    """The width of the pieces in which a row is normed: a divisor, within 128 to 512 values."""
    return min(512, max(128, width & -width))


def _rotation(how: Rotation) -> dict[str, Any]:
    constants = how.constants()
    del constants["STACKED"]
    return constants


def _words(w_q: Tensor) -> Tensor:
    return w_q.view(torch.int32)


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
def load_bias(bias, n):
    """The bias of rows n, or zero where there is none."""
    if bias is None:
        return 0.0
    else:
        return tl.load(bias + n)


@triton.jit
def normed(x, weights, eps, K: tl.constexpr):
    """`rms_norm` of a row in pieces; `weights` are those of the norm, if any."""
    squares = x[0] * x[0]
    for i in tl.static_range(1, len(x)):
        squares += x[i] * x[i]
    inverse = inverse_rms(tl.sum(squares), K, eps)
    y = ()
    for i in tl.static_range(len(x)):
        if len(weights) == 0:
            y = y + (x[i] * inverse,)
        else:
            y = y + (x[i] * inverse * weights[i],)
    return y


@triton.jit
def _store(y, out, residual, residual_stride, row, n, N):  # noqa: ANN202
    if residual is not None:
        y = tl.load(residual + row * residual_stride + n, mask=n < N) + y
    tl.store(out + row * N + n, y, mask=n < N)


@triton.jit
def _linear_kernel(  # noqa: ANN202
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
    weight, scales = load_constants(w, w_scale, w_scale_step, held, K, PARTS, GROUP, COLUMNS)
    b = load_bias(bias, held)
    await_inputs(CHAIN)
    for row in range(rows):
        words = load_words(x + row * x_stride, PARTS, K)
        scale = tl.load(x_scale + row * x_scale_step)
        y = product(weight, scales, words, scale, GROUP) + b
        _store(y, out, residual, residual_stride, row, n, N)


@triton.jit
def _norm_kernel(  # noqa: ANN202
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
    weight, scales = load_constants(w, w_scale, w_scale_step, held, K, PARTS, GROUP, COLUMNS)
    b = load_bias(bias, held)
    norm_weights = load_norm(norm_weight, K, PIECE)
    await_inputs(CHAIN)
    for row in range(rows):
        pieces = load_pieces(x + row * x_stride, K, PIECE)
        words, scale = quantized(normed(pieces, norm_weights, eps, K), PARTS)
        y = product(weight, scales, words, scale, GROUP) + b
        _store(y, out, None, 0, row, n, N)


@triton.jit
def load_norm(norm_weight, K: tl.constexpr, PIECE: tl.constexpr):
    """The weights of a norm in pieces, or nothing where it has none."""
    if norm_weight is None:
        return ()
    else:
        return load_pieces(norm_weight, K, PIECE)


@triton.jit
def _hadamard_kernel(  # noqa: ANN202
    x,
    x_stride,
    rows,
    w,
    w_scale,
    w_scale_step,
    bias,
    residual,
    residual_stride,
    out,
    N,
    WIDTH: tl.constexpr,
    SIGNS: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    INNER: tl.constexpr,
    FACTOR: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHAIN: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    held = tl.minimum(n, N - 1)
    weight, scales = load_constants(w, w_scale, w_scale_step, held, K, PARTS, GROUP, COLUMNS)
    b = load_bias(bias, held)
    await_inputs(CHAIN)
    for row in range(rows):
        pieces = load_pieces(x + row * x_stride, K, WIDTH)
        words, scale = rotated(pieces, PARTS, SIGNS, DOUBLINGS, INNER, FACTOR)
        y = product(weight, scales, words, scale, GROUP) + b
        _store(y, out, residual, residual_stride, row, n, N)


@triton.jit
def _gated_kernel(  # noqa: ANN202
    x,
    x_stride,
    gate,
    gate_stride,
    gate_scale,
    norm_weight,
    eps,
    rows,
    w,
    w_scale,
    w_scale_step,
    bias,
    residual,
    residual_stride,
    out,
    N,
    NORM_FIRST: tl.constexpr,
    SCALE_PER_CHANNEL: tl.constexpr,
    ROTATE: tl.constexpr,
    WIDTH: tl.constexpr,
    SIGNS: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    INNER: tl.constexpr,
    FACTOR: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHAIN: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    held = tl.minimum(n, N - 1)
    weight, scales = load_constants(w, w_scale, w_scale_step, held, K, PARTS, GROUP, COLUMNS)
    b = load_bias(bias, held)
    await_inputs(CHAIN)
    for row in range(rows):
        y = load_pieces(x + row * x_stride, K, WIDTH)
        gates = load_pieces(gate + row * gate_stride, K, WIDTH)
        # From the cache for each row anew: as many registers as the row itself takes would hold it.
        norm_weights = load_pieces(norm_weight, K, WIDTH)
        factors = _gates(gates, gate_scale, SCALE_PER_CHANNEL, K, WIDTH)
        if NORM_FIRST:
            y = _multiplied(normed(y, norm_weights, eps, K), factors)
        else:
            y = normed(_multiplied(y, factors), norm_weights, eps, K)
        if ROTATE:
            words, scale = rotated(y, PARTS, SIGNS, DOUBLINGS, INNER, FACTOR)
        else:
            words, scale = quantized(y, PARTS)
        y = product(weight, scales, words, scale, GROUP) + b
        _store(y, out, residual, residual_stride, row, n, N)


@triton.jit
def _gates(  # noqa: ANN202
    gate,
    gate_scale,
    SCALE_PER_CHANNEL: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """silu of the pieces of an int8 gate."""
    factors = ()
    if SCALE_PER_CHANNEL:
        channel_scales = load_pieces(gate_scale, K, WIDTH)
        for i in tl.static_range(len(gate)):
            factors = factors + (silu(to_float(gate[i]) * channel_scales[i]),)
    else:
        for i in tl.static_range(len(gate)):
            factors = factors + (silu(to_float(gate[i]) * tl.load(gate_scale)),)
    return factors


@triton.jit
def _multiplied(x, y):  # noqa: ANN202
    products = ()
    for i in tl.static_range(len(x)):
        products = products + (x[i] * y[i],)
    return products


def int8_linear_rows(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    block_n: int | None = None,
    num_warps: int | None = None,
    maxnreg: int | None = None,
) -> Tensor:
    """`ssmc.ops.int8_linear` of at most MAX_ROWS rows; `kernels.matmul` takes over beyond.

    With a residual [..., N] it is `ssmc.ops.int8_linear_add`.
    """
    x = row_view(x_q)
    how = matvec(w_q, w_scale, x.shape[0], 1, False, block_n, num_warps, maxnreg)
    if how is None:
        from ssmc.kernels.matmul import int8_linear, int8_linear_add

        if residual is not None:
            return int8_linear_add(x_q, x_scale, w_q, w_scale, bias, residual)
        return int8_linear(x_q, x_scale, w_q, w_scale, bias)
    n = w_q.shape[0]
    out = torch.empty((*x_q.shape[:-1], n), device=x.device)
    before = None if residual is None else row_view(residual)
    launch(
        _linear_kernel,
        (triton.cdiv(n, how.block_n),),
        x,
        x.stride(0),
        x_scale,
        _step(x_scale),
        x.shape[0],
        _words(w_q),
        w_scale,
        _step(w_scale),
        bias,
        before,
        0 if before is None else before.stride(0),
        out,
        n,
        device=x.device,
        **how.constants(),
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
    how = matvec(w_q, w_scale, m, piece, False, block_n, num_warps, maxnreg)
    if how is None:
        from ssmc.kernels.norm import rms_norm_quantize

        return int8_linear_rows(*rms_norm_quantize(x, norm_weight, eps), w_q, w_scale, bias)
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


def hadamard_linear_step(
    x: Tensor,
    block: int,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    block_n: int | None = None,
    num_warps: int | None = None,
    maxnreg: int | None = None,
) -> Tensor:
    """Kernel of `ssmc.ops.hadamard_linear_step`; two kernels where one has no tiles or rotation."""
    flat, before = row_view(x), row_view(residual)
    m, n = flat.shape[0], w_q.shape[0]
    rotation = plan(x.shape[-1], block)
    how = None
    if rotation is not None and rotation.width >= WORD:
        how = matvec(w_q, w_scale, m, rotation.width, True, block_n, num_warps, maxnreg)
    if how is None or rotation is None:
        from ssmc.kernels.hadamard import hadamard_quantize

        return int8_linear_rows(*hadamard_quantize(x, block), w_q, w_scale, bias, residual)
    out = torch.empty((*x.shape[:-1], n), device=x.device)
    launch(
        _hadamard_kernel,
        (triton.cdiv(n, how.block_n),),
        flat,
        flat.stride(0),
        m,
        _words(w_q),
        w_scale,
        _step(w_scale),
        bias,
        before,
        before.stride(0),
        out,
        n,
        device=x.device,
        **_rotation(rotation),
        **how.constants(),
    )
    return out


def gated_norm_linear_step(
    x: Tensor,
    gate_q: Tensor,
    gate_scale: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
    block: int,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    block_n: int | None = None,
    num_warps: int | None = None,
    maxnreg: int | None = None,
) -> Tensor:
    """Kernel of `ssmc.ops.gated_norm_linear_step`; two kernels also for norms of several groups."""
    flat, gate, before = row_view(x), row_view(gate_q), row_view(residual)
    m, n = flat.shape[0], w_q.shape[0]
    rotation = plan(x.shape[-1], block)
    how = None
    if rotation is not None and rotation.width >= WORD and group_size in (None, x.shape[-1]):
        how = matvec(w_q, w_scale, m, rotation.width, True, block_n, num_warps, maxnreg)
    if how is None or rotation is None:
        from ssmc.kernels.norm import gated_norm_quantize

        q, scale = gated_norm_quantize(
            x, gate_q, gate_scale, weight, eps, group_size, norm_before_gate, block
        )
        return int8_linear_rows(q, scale, w_q, w_scale, bias, residual)
    out = torch.empty((*x.shape[:-1], n), device=x.device)
    launch(
        _gated_kernel,
        (triton.cdiv(n, how.block_n),),
        flat,
        flat.stride(0),
        gate,
        gate.stride(0),
        gate_scale,
        weight,
        eps,
        m,
        _words(w_q),
        w_scale,
        _step(w_scale),
        bias,
        before,
        before.stride(0),
        out,
        n,
        device=x.device,
        NORM_FIRST=norm_before_gate,
        SCALE_PER_CHANNEL=gate_scale.numel() > 1,
        ROTATE=block > 1,
        **_rotation(rotation),
        **how.constants(),
    )
    return out
