"""Decoding's linear layers: a weight times a few int8 rows, bound by reading the weight once.

A program multiplies BLOCK_N rows of the weight. It asks for them before it waits for the kernel in
front, so that this traffic, which is most of what decoding costs, goes on while small kernels (norm,
rotation, state update) make the row. That is why those are kernels of their own: repeated by every
program behind its weight, they would leave the memory idle.
"""

# Tuples of parts grow in loops that Triton unrolls; it knows no starred expressions.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels.arithmetic import times_scale
from ssmc.kernels.launch import INTERPRETED, await_inputs, launch
from ssmc.kernels.pieces import row_view

MAX_ROWS = 8
"""Most rows that one kernel serves: each is a pass of its own over the weight in registers."""
PROGRAMS = 256
"""Programs wanted at least, about two for each multiprocessor of a large GPU."""
TILE_BYTES = 40 * 1024
"""Most bytes of the weight that a program holds."""

_INTERPRETED = tl.constexpr(INTERPRETED)
_EIGHTS = tl.constexpr(-0x07070708)  # four bytes of -8


@dataclass(frozen=True)
class Tiles:
    """How a weight [N, K] is cut: `parts` words of a row side by side, `block_n` rows a program.

    `group` is the size of a weight's groups of 4 bits, 0 for int8. None of it changes a bit of the
    result but the order in which groups are summed.
    """

    words: int
    parts: tuple[int, ...]
    group: int
    block_n: int
    warps: int

    def constants(self) -> dict[str, Any]:
        """The compile-time arguments of a kernel that calls `load_weight`."""
        return {
            "WORDS": self.words,
            "PARTS": self.parts,
            "GROUP": self.group,
            "BLOCK_N": self.block_n,
            "num_warps": self.warps,
            "num_stages": 1,
        }


def tiles(
    x_q: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    block_n: int | None = None,
    num_warps: int | None = None,
) -> Tiles | None:
    """The tiles of a product; None where `ssmc.kernels.matmul` serves better, or only it can.

    That takes more than MAX_ROWS rows x_q [rows, K], and operands that are no aligned words.
    """
    n, row_bytes = w_q.shape
    group = 2 * row_bytes // w_scale.shape[1] if w_q.dtype == torch.uint8 else 0
    aligned = all(x.storage_offset() % 4 == 0 for x in (x_q, w_q)) and w_q.is_contiguous()
    whole = row_bytes % 4 == 0 and x_q.stride(0) % 4 == 0 and not group & (group - 1)
    if x_q.shape[0] > MAX_ROWS or not aligned or not whole or 0 < group < 8:
        return None
    words = row_bytes // 4
    parts = parts_of(words, max(32, group // 8))
    if block_n is None:
        block_n = 1
        while 8 * block_n * sum(parts) <= TILE_BYTES and n >= 2 * block_n * PROGRAMS:
            block_n *= 2
    return Tiles(words, parts, group, block_n, num_warps or 4)


def parts_of(width: int, smallest: int, most: int = 3) -> tuple[int, ...]:
    """At most `most` powers of two, the larger first, whose sum is the least that holds `width`.

    What a row is cut into, as the shapes of tensors in kernels are powers of two: 1,280 is 1,024
    and 256. All are multiples of `smallest`, itself a power of two; only the last may reach beyond
    the width.
    """
    parts: list[int] = []
    rest = width
    while rest > 0:
        part = 1 << (rest.bit_length() - 1)
        if part < rest and (len(parts) == most - 1 or part < smallest):
            part *= 2
        parts.append(max(part, smallest))
        rest -= parts[-1]
    return tuple(parts)


@triton.constexpr_function
def start_of(parts, index):
    """Where part `index` of a row begins."""
    return sum(parts[:index])


@triton.jit
def dot4(a, b, c):
    """c + the sum of the products of the four int8 values in the words a and b; all int32."""
    if _INTERPRETED:
        for byte in tl.static_range(4):
            c += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
        return c
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def load_weight(
    words,
    scale,
    scale_step,
    n,
    WORDS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Rows n [BLOCK_N] of a weight in parts [BLOCK_N, words], and the scales of rows or groups."""
    at = words + n.to(tl.int64)[:, None] * WORDS
    weight = ()
    for p in tl.static_range(len(PARTS)):
        word = start_of(PARTS, p) + tl.arange(0, PARTS[p])[None, :]
        if start_of(PARTS, p) + PARTS[p] > WORDS:
            weight = weight + (tl.load(at + word, mask=word < WORDS, other=0),)
        else:
            weight = weight + (tl.load(at + word),)
    if GROUP == 0:
        scales = tl.load(scale + n * scale_step)
    else:
        scales = ()
        PER_GROUP: tl.constexpr = GROUP // 8
        for p in tl.static_range(len(PARTS)):
            first = start_of(PARTS, p) // PER_GROUP
            group = first + tl.arange(0, PARTS[p] // PER_GROUP)[None, :]
            at = scale + n.to(tl.int64)[:, None] * (WORDS // PER_GROUP) + group
            scales = scales + (tl.load(at, mask=group < WORDS // PER_GROUP, other=0.0),)
    return weight, scales


@triton.jit
def product(
    weight,
    scales,
    x,
    x_scale,
    WORDS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """float32 [BLOCK_N]: the weight times the int8 row at x (words), with all scales applied."""
    if GROUP == 0:
        sums = _int8_sums(weight[0], x, 0, WORDS)
        for p in tl.static_range(1, len(PARTS)):
            sums += _int8_sums(weight[p], x, start_of(PARTS, p), WORDS)
        return times_scale(sums, tl.load(x_scale) * scales)
    else:
        total = _int4_sums(weight[0], scales[0], x, 0, WORDS, GROUP)
        for p in tl.static_range(1, len(PARTS)):
            total += _int4_sums(weight[p], scales[p], x, start_of(PARTS, p), WORDS, GROUP)
        return total * tl.load(x_scale)


@triton.jit
def _int8_sums(weight, x, START: tl.constexpr, WORDS: tl.constexpr):  # noqa: ANN202
    """int32 [BLOCK_N]: the products of one part."""
    word = START + tl.arange(0, weight.shape[1])
    row = tl.load(x + word, mask=word < WORDS, other=0)
    row = tl.broadcast_to(row[None, :], weight.shape)
    return tl.sum(dot4(weight, row, tl.zeros_like(weight)), 1)


@triton.jit
def _int4_sums(weight, scales, x, START: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr):  # noqa: ANN202
    """float32 [BLOCK_N]: the products of one part, scaled group by group.

    A word holds four columns of the first half of its group in the low bits and the same four of
    the second half in the high ones. The bits are the value plus 8, so that each word's sum begins
    with -8 times the sum of x.
    """
    LENGTH: tl.constexpr = GROUP // 8
    rows: tl.constexpr = weight.shape[0]
    words: tl.constexpr = weight.shape[1]
    word = START + tl.arange(0, words)
    first = word // LENGTH * (2 * LENGTH) + word % LENGTH
    low = tl.load(x + first, mask=word < WORDS, other=0)
    high = tl.load(x + first + LENGTH, mask=word < WORDS, other=0)
    eights = tl.full([words], _EIGHTS, tl.int32)
    offset = dot4(high, eights, dot4(low, eights, tl.zeros_like(low)))
    low = tl.broadcast_to(low[None, :], weight.shape)
    high = tl.broadcast_to(high[None, :], weight.shape)
    sums = dot4(weight & 0x0F0F0F0F, low, tl.broadcast_to(offset[None, :], weight.shape))
    sums = dot4((weight >> 4) & 0x0F0F0F0F, high, sums)
    sums = tl.sum(tl.reshape(sums, [rows, words // LENGTH, LENGTH]), 2)
    return tl.sum(sums.to(tl.float32) * scales, 1)


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
    WORDS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHAIN: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    held = tl.minimum(n, N - 1)
    weight, scales = load_weight(w, w_scale, w_scale_step, held, WORDS, PARTS, GROUP)
    b = load_bias(bias, held)
    await_inputs(CHAIN)
    for row in range(rows):
        y = product(
            weight, scales, x + row * x_stride, x_scale + row * x_scale_step, WORDS, PARTS, GROUP
        )
        y += b
        if residual is not None:
            y = tl.load(residual + row * residual_stride + held) + y
        tl.store(out + row * N + n, y, mask=n < N)


@triton.jit
def load_bias(bias, n):
    """The bias of rows n, or zero where there is none."""
    if bias is None:
        return 0.0
    else:
        return tl.load(bias + n)


def step_of(scale: Tensor) -> int:
    """From one scale to the next: 0 where one serves all."""
    return 0 if scale.numel() == 1 else 1


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
) -> Tensor:
    """`ssmc.ops.int8_linear` of at most MAX_ROWS rows; `kernels.matmul` takes over beyond.

    With a residual [..., N] it is `ssmc.ops.int8_linear_add`.
    """
    x = row_view(x_q)
    how = tiles(x, w_q, w_scale, block_n, num_warps)
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
        x.view(torch.int32),
        x.stride(0) // 4,
        x_scale,
        step_of(x_scale),
        x.shape[0],
        w_q.view(torch.int32),
        w_scale,
        step_of(w_scale),
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
    **config: int,
) -> Tensor:
    """Kernels of `ssmc.ops.norm_linear_step`."""
    from ssmc.kernels.norm import rms_norm_quantize

    q, scale = rms_norm_quantize(x, norm_weight, eps)
    return int8_linear_rows(q, scale, w_q, w_scale, bias, **config)


def hadamard_linear_step(
    x: Tensor,
    block: int,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    **config: int,
) -> Tensor:
    """Kernels of `ssmc.ops.hadamard_linear_step`."""
    from ssmc.kernels.hadamard import hadamard_quantize

    q, scale = hadamard_quantize(x, block)
    return int8_linear_rows(q, scale, w_q, w_scale, bias, residual, **config)


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
    **config: int,
) -> Tensor:
    """Kernels of `ssmc.ops.gated_norm_linear_step`."""
    from ssmc.kernels.norm import gated_norm_quantize

    q, scale = gated_norm_quantize(
        x, gate_q, gate_scale, weight, eps, group_size, norm_before_gate, block
    )
    return int8_linear_rows(q, scale, w_q, w_scale, bias, residual, **config)
