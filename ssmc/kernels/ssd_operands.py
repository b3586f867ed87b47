"""What the kernels of `int8_ssd_scan` share: operands of any form, weights within a chunk."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels.arithmetic import softplus
from ssmc.kernels.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
QMAX = tl.constexpr(127.0)
HALF_LIMIT = tl.constexpr(32768.0)  # leaves a factor of 2 below the largest float16
SMALL = tl.constexpr(1e-30)  # in place of a bound of zero; its inverse is still finite


@triton.jit
def fast_exp2(x):
    """2^x, zero below the normal numbers: without the instructions that would keep those."""
    if _INTERPRETED:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def to_half(q):
    """int8 as float16, four at a time: q + 128 in the low bits of 1024, then minus 1152."""
    if _INTERPRETED:
        y = q.to(tl.float16)
    else:
        y = tl.inline_asm_elementwise(
            """{
            .reg .b32 u, offset;
            mov.b32 offset, 0x64806480;
            xor.b32 u, $2, 0x80808080;
            prmt.b32 $0, u, 0x64646464, 0x4140;
            prmt.b32 $1, u, 0x64646464, 0x4342;
            sub.rn.f16x2 $0, $0, offset;
            sub.rn.f16x2 $1, $1, offset;
            }""",
            "=&r,=&r,r",
            [q],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    return y


@triton.jit
def positions(chunk, length, REVERSE: tl.constexpr, CHUNK: tl.constexpr):
    """Positions of a chunk: (the first, int64; what to add, [T]; which of them there are, [T])."""
    s = tl.arange(0, CHUNK)
    start = chunk * CHUNK
    first = (length - 1 - start if REVERSE else start).to(tl.int64)
    return first, -s if REVERSE else s, s < length - start


@triton.jit
def of_head(operand, batch, head, position=0):
    """Pointers to a position of (integers, scales) of one sequence and head, all of them int64."""
    q, scale, steps, scale_steps = operand
    q += batch * steps[0] + position * steps[1] + head * steps[2]
    return q, scale + batch * scale_steps[0] + position * scale_steps[1] + head * scale_steps[2]


@triton.jit
def int8_rows(q, scale, operand, position, valid, width, COLUMNS: tl.constexpr, FORM: tl.constexpr):
    """Rows [T, C] of int8, as float16 integers and a float32 factor a row [T].

    FORM says where the scale differs: 'row' (in the factor); 'column' (the factor is 1, the scale
    is the caller's); 'any' (what comes back is the dequantised row, its largest entry 127).
    """
    steps, scale_steps = operand[2], operand[3]
    column = tl.arange(0, COLUMNS)
    mask = valid[:, None] & (column < width)[None, :]
    values = tl.load(q + position[:, None] * steps[1] + column[None, :], mask, 0)
    rows = scale + position * scale_steps[1]
    if FORM == "any":
        scales = tl.load(rows[:, None] + column[None, :] * scale_steps[3], mask, 0.0)
        real = values.to(tl.float32) * scales
        factor = tl.maximum(tl.max(tl.abs(real), 1), SMALL) / QMAX
        integers = (real / factor[:, None]).to(tl.float16)
    else:
        integers = to_half(values)
        factor = tl.full([position.shape[0]], 1.0, tl.float32)
        if FORM == "row":
            factor = tl.load(rows, valid, 0.0)
    return integers, factor


@triton.jit
def step_sizes(q, scale, operand, bias, limits, position, valid):
    """dt of a chunk [T], zero behind the end."""
    steps, scale_steps = operand[2], operand[3]
    dt = tl.load(q + position * steps[1], valid, 0).to(tl.float32)
    dt = softplus(dt * tl.load(scale + position * scale_steps[1], valid, 0.0) + bias)
    return tl.where(valid, tl.minimum(tl.maximum(dt, limits[0]), limits[1]), 0.0)


@triton.jit
def chunk_weights(dt, rate, factor):
    """What the positions of chunks weigh in those behind them: three [K, T], two numbers [K].

    `since`: the base-2 logarithm of the decay since the chunk's start; `whole` that of all of it,
    positive where A is. Position s weighs dt factor 2^(since[t] - since[s]) in position t, that is
    `largest` within[s] 2^(since[t] - since[s] - max(whole, 0)), and in the chunk's end `largest`
    until_end[s] / 256: within and what follows it are at most 1.
    """
    own = dt * rate
    since = tl.cumsum(own, 1)
    # A sum from the end: as a difference of sums from the start, what decays least, and so counts
    # most, would have the error of the largest.
    left = tl.cumsum(own, 1, reverse=True) - own
    whole = tl.sum(own, 1)
    growth = tl.maximum(whole, 0.0)
    factor *= dt
    largest = tl.maximum(tl.max(tl.abs(factor), 1), SMALL)
    within = factor / largest[:, None]
    until_end = within * tl.exp2(left - growth[:, None]) * 256.0
    return since, within, until_end, whole, largest * tl.exp2(growth)


@triton.jit
def state_update(x, B, until_end, SPLIT: tl.constexpr):
    """(until_end x)' B for x [T, P], B [T, N], until_end [T]; float32 [P, N]."""
    weighted = x.to(tl.float32) * until_end[:, None]
    high = weighted.to(tl.float16)
    added = tl.dot(tl.trans(high), B)
    if SPLIT:
        low = (weighted - high.to(tl.float32)).to(tl.float16)
        added = tl.dot(tl.trans(low), B, added)
    return added


def _steps(x: Tensor) -> tuple[int, ...]:
    """Strides, zero in dimensions of one element."""
    return tuple(0 if n == 1 else step for n, step in zip(x.shape, x.stride(), strict=True))


def operand(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...], tuple[int, ...]]:
    """(integers, scales, strides of either), where the channels of q [B, L, ..] are adjacent."""
    if q.dim() == 4 and q.stride(3) != 1 and q.shape[3] > 1:
        q = q.contiguous()
    return q, scale, _steps(q), _steps(scale.expand(q.shape))


def form(operand: tuple[Any, ...], *forms: str) -> str:
    """The first of `forms` ('row', 'column') that holds for the scale of an operand, or 'any'."""
    batch, step, _, channel = operand[3]
    holds = {"row": channel == 0, "column": batch == 0 and step == 0}
    return next((form for form in forms if holds[form]), "any")
