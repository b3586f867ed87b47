"""`int8_ssd_scan`: the scan of Mamba-2 over a prompt, chunk by chunk in segments side by side.

Dao and Gu, 'Transformers are SSMs' (arXiv 2405.21060), section 6, in four kernels. Two prepare
what does not depend on the state (`ssmc.kernels.ssd_chunks`): C B' of each chunk, which all heads
of a group share, and what each position weighs within its chunk. The third finds what each segment
of some chunks adds to the state. In the fourth every program puts the state in front of its
segment together and goes through its chunks with the state in registers: outputs are what the
positions of a chunk give to one another and what the state in front of it gives.

A segment's chunks are worked on one after another; so there are as many segments as keep a GPU
busy, but no more, since to find the state in front takes as many steps as there are in front.
On a Hopper GPU the kernels of `ssmc.kernels.ssd_hopper` do what the third and the fourth do here.

Precision. x, B and C are int8, hence exact in float16, and so is C B' in float32. What multiplies
them is rounded to float16 (11 bits, relative error 2e-4 of a term): C B' and the weights of
positions in one another, D among them; the state where it meets C, and what goes into it within a
segment. What is rounded is first divided by a bound on it, so that float16 neither overflows nor,
within 2^29 of the largest, loses bits. Of what a segment adds to the state the float16 numbers are
sums of two, so that the state in front of a segment and the new one have about the precision of
float32.

Chained kernels. Each awaits the one in front before it lets the next begin. So all but the first
may read what was there before the first without waiting; the second waits only to write.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels import ssd_hopper
from ssmc.kernels.launch import await_inputs, can_chain, launch
from ssmc.kernels.ssd_chunks import prepare
from ssmc.kernels.ssd_operands import (
    HALF_LIMIT,
    QMAX,
    SMALL,
    fast_exp2,
    form,
    int8_rows,
    of_head,
    operand,
    positions,
    state_update,
)
from ssmc.kernels.tiles import processors

_CHANNELS = 64  # of the state a program
_PROGRAMS = 2  # a multiprocessor


@triton.jit
def _x_scales(x, head, p, width, X_FORM: tl.constexpr):
    """The scales of channels p where they have some of their own, else ones."""
    scales = tl.full(p.shape, 1.0, tl.float32)
    if X_FORM == "column":
        scales = tl.load(x[1] + head * x[3][2] + p * x[3][3], p < width, 0.0)
    return scales


@triton.jit
def _x_rows(
    x, batch, head, part, start, position, valid, width,
    CHANNELS: tl.constexpr,
    X_FORM: tl.constexpr,
):  # fmt: skip
    """`int8_rows` of a part of the channels of x."""
    q, scale = of_head(x, batch, head, start)
    q, scale = q + part * CHANNELS, scale + part * CHANNELS * x[3][3]
    left = width - part * CHANNELS
    return int8_rows(q, scale, x, position, valid, left, CHANNELS, X_FORM)


@triton.jit
def _sums_kernel(
    x,
    B,
    weights,
    sizes,
    sums,
    totals,
    length,
    heads,
    groups,
    width,
    rank,
    share,
    REVERSE: tl.constexpr,
    X_FORM: tl.constexpr,
    B_FORM: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    CHAIN: tl.constexpr,
) -> None:
    """What a segment of `share` chunks adds to CHANNELS of the state of one head.

    sums [B H, segments, P, N], and totals [B H, segments], the base-2 logarithm of its decay.
    """
    row, part, segment = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    rows, segments = tl.num_programs(0).to(tl.int64), tl.num_programs(2)
    batch, head = row // heads, row % heads
    group = head // (heads // groups)
    chunks = tl.cdiv(length, CHUNK)
    first = segment * share
    s, n = tl.arange(0, CHUNK), tl.arange(0, RANK)
    p = part * CHANNELS + tl.arange(0, CHANNELS)
    weights += row * chunks * (4 * CHUNK) + 2 * CHUNK + s
    sizes += row * chunks
    channel = _x_scales(x, head, p, width, X_FORM)
    h = tl.zeros([CHANNELS, RANK], tl.float32)
    total = 0.0
    await_inputs(CHAIN)

    for chunk in range(first, tl.minimum(first + share, chunks)):
        start, position, valid = positions(chunk, length, REVERSE, CHUNK)
        B_at = of_head(B, batch, group, start)
        x_t, _ = _x_rows(x, batch, head, part, start, position, valid, width, CHANNELS, X_FORM)
        B_t, _ = int8_rows(B_at[0], B_at[1], B, position, valid, rank, RANK, B_FORM)
        until_end = tl.load(weights + chunk * (4 * CHUNK))
        whole, largest = tl.load(sizes + chunk), tl.load(sizes + rows * chunks + chunk)
        growing = state_update(x_t, B_t, until_end, SPLIT)
        h = tl.fma(growing, _wide(channel * (largest * (1 / 256)), RANK), h * tl.exp2(whole))
        total += whole
    here = row * segments + segment
    sums += here * WIDTH * RANK + p[:, None] * RANK + n[None, :]
    tl.store(sums, h)
    tl.store(totals + here, total)


@triton.jit
def _wide(x, COLUMNS: tl.constexpr):
    """x [T] in each of so many columns."""
    return tl.broadcast_to(x[:, None], x.shape[0], COLUMNS)


@triton.jit
def _outputs_kernel(
    x,
    B,
    C,
    D,
    weights,
    sizes,
    between,
    C_sizes,
    state,
    sums,
    totals,
    y,
    new_state,
    length,
    heads,
    groups,
    width,
    rank,
    share,
    REVERSE: tl.constexpr,
    X_FORM: tl.constexpr,
    B_FORM: tl.constexpr,
    C_FORM: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    CHAIN: tl.constexpr,
) -> None:
    """y of a segment of `share` chunks, of CHANNELS of one head; of the last the new state."""
    row, part, segment = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    rows, segments = tl.num_programs(0).to(tl.int64), tl.num_programs(2)
    batch, head = row // heads, row % heads
    group = head // (heads // groups)
    chunks = tl.cdiv(length, CHUNK)
    first = segment * share
    s, n = tl.arange(0, CHUNK), tl.arange(0, RANK)
    p = part * CHANNELS + tl.arange(0, CHANNELS)
    weights += row * chunks * (4 * CHUNK) + s
    sizes += row * chunks
    between += (batch * groups + group) * chunks * CHUNK * CHUNK + s[:, None] * CHUNK + s[None, :]
    C_sizes += (batch * groups + group) * chunks
    sums += row * segments * WIDTH * RANK + p[:, None] * RANK + n[None, :]
    totals += row * segments
    channel = _x_scales(x, head, p, width, X_FORM)
    widest = tl.max(tl.abs(channel), 0) * (CHUNK * QMAX * QMAX)
    skip = 0.0
    if D is not None:
        skip = tl.load(D + head)
    cell = (row * width + p)[:, None] * rank + n[None, :]
    in_cell = (p < width)[:, None] & (n < rank)[None, :]
    h = tl.zeros([CHANNELS, RANK], tl.float32)
    if state is not None:
        h = tl.load(state + cell, in_cell, 0.0).to(tl.float32)
    await_inputs(CHAIN)

    for earlier in range(segment):
        h = h * tl.exp2(tl.load(totals + earlier)) + tl.load(sums + earlier * WIDTH * RANK)
    if segment == segments - 1:
        new = h * tl.exp2(tl.load(totals + segment)) + tl.load(sums + segment * WIDTH * RANK)
        tl.store(new_state + cell, new.to(new_state.dtype.element_ty), in_cell)
    bound = tl.maximum(tl.max(tl.abs(h)), SMALL)

    for chunk in range(first, tl.minimum(first + share, chunks)):
        start, position, valid = positions(chunk, length, REVERSE, CHUNK)
        B_at, C_at = of_head(B, batch, group, start), of_head(C, batch, group, start)
        x_t, x_factor = _x_rows(
            x, batch, head, part, start, position, valid, width, CHANNELS, X_FORM
        )
        B_t, _ = int8_rows(B_at[0], B_at[1], B, position, valid, rank, RANK, B_FORM)
        C_t, _ = int8_rows(C_at[0], C_at[1], C, position, valid, rank, RANK, C_FORM)
        kept = weights + chunk * (4 * CHUNK)
        since, within = tl.load(kept), tl.load(kept + CHUNK)
        until_end, reading = tl.load(kept + 2 * CHUNK), tl.load(kept + 3 * CHUNK)
        whole, largest = tl.load(sizes + chunk), tl.load(sizes + rows * chunks + chunk)

        # D stands on the diagonal of the weights: `unit` is a bound on these, D and 2^-15.
        size = tl.load(C_sizes + chunk) * (largest * (RANK / 2.0))
        unit = tl.maximum(size, SMALL)
        if D is not None:
            x_largest = 1.0 if X_FORM == "column" else tl.max(x_factor, 0)
            unit = tl.maximum(unit, tl.abs(skip) * (x_largest * (1 / HALF_LIMIT)))
        # The exponents of what counts are never above zero.
        exponent = (since - tl.maximum(whole, 0.0))[:, None] - since[None, :]
        decay = fast_exp2(tl.minimum(exponent, 0.0))
        products = tl.load(between + chunk * CHUNK * CHUNK).to(tl.float32)
        weight = (products * (within * (size / unit))[None, :]) * decay
        if D is not None:
            weight = tl.where(
                s[:, None] == s[None, :], weight + (x_factor * (skip / unit))[:, None], weight
            )
        inside = tl.dot(weight.to(tl.float16), x_t) * (channel * unit)[None, :]

        rounded = (h * (HALF_LIMIT / bound)).to(tl.float16)
        reading = _wide(reading * (bound * (1 / HALF_LIMIT)), CHANNELS)
        result = tl.fma(tl.dot(C_t, tl.trans(rounded)), reading, inside)
        at = y + ((batch * length + start) * heads + head) * width
        at += (position * (heads * width))[:, None] + p[None, :]
        tl.store(at, result, valid[:, None] & (p < width)[None, :])

        growing, remains = state_update(x_t, B_t, until_end, False), tl.exp2(whole)
        h = tl.fma(growing, _wide(channel * (largest * (1 / 256)), RANK), h * remains)
        bound = tl.maximum(bound * remains + largest * widest, SMALL)


def _segments(programs: int, chunks: int, device: torch.device) -> int:
    """Parts of the length, where without them there are so many programs."""
    wanted = _PROGRAMS * processors(device) // max(programs, 1)
    return max(1, min(wanted, math.isqrt(2 * chunks)))


def int8_ssd_scan(
    x_q: Tensor,
    x_scale: Tensor,
    dt_q: Tensor,
    dt_scale: Tensor,
    A: Tensor,
    B_q: Tensor,
    B_scale: Tensor,
    C_q: Tensor,
    C_scale: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state: Tensor | None = None,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    reverse: bool = False,
    *,
    chunk: int | None = None,
    channels: int | None = None,
    segments: int | None = None,
    split: bool = True,
    state_dtype: torch.dtype = torch.float32,
    asynchronous: bool = True,
    num_warps: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssmc.ops.int8_ssd_scan`: x_q [B, L, H, P], B_q and C_q [B, L, G, N] int8; any length.

    Integers may be views with adjacent channels, scales are any that broadcast. Returns y float32
    [B, L, H, P] to about 3e-4 and the new state [B, H, P, N] to about 1e-6; the state given stays
    as it is and may be of 16 bits, the new one has `state_dtype`. Without `split` that is as
    precise as y. `chunk` positions (a power of two, at least 16) are one matrix product, of
    `channels` (likewise) of one head a program, and the length is divided into `segments`. Where
    they fit and not `asynchronous` forbids it, the kernels of `ssmc.kernels.ssd_hopper` take
    chunks and parts of 64; num_warps is for the others.
    """
    batch, length, heads, width = x_q.shape
    groups, rank = B_q.shape[2:]
    rows, device = batch * heads, x_q.device
    WIDTH, RANK = (max(16, triton.next_power_of_2(n)) for n in (width, rank))
    x, dt = operand(x_q, x_scale), operand(dt_q, dt_scale)
    B, C = operand(B_q, B_scale), operand(C_q, C_scale)
    forms = (form(x, "column", "row"), form(B, "row"), form(C, "row"))
    hopper = asynchronous and chunk in (None, ssd_hopper.CHUNK) and can_chain(device)
    hopper = hopper and ssd_hopper.fits(x[0], RANK, forms, reverse)
    if hopper:
        chunk, channels = ssd_hopper.CHUNK, ssd_hopper.CHANNELS
    chunk = chunk or min(64, max(16, triton.next_power_of_2(length)))
    # Rows of x that are scaled anew need all of their columns.
    channels = WIDTH if forms[0] == "any" else min(channels or _CHANNELS, WIDTH)
    how = {"REVERSE": reverse, "CHUNK": chunk, "WIDTH": WIDTH, "RANK": RANK}
    how |= dict(zip(("X_FORM", "B_FORM", "C_FORM"), forms, strict=True))
    made = prepare(x, dt, B, C, A, dt_bias, (dt_min, dt_max), how, copied=hopper)

    parts, chunks = WIDTH // channels, triton.cdiv(length, chunk)
    share = triton.cdiv(chunks, segments or _segments(rows * parts, chunks, device))
    segments = max(1, triton.cdiv(chunks, max(1, share)))
    y = torch.empty(x_q.shape, dtype=torch.float32, device=device)
    new_state = torch.empty((batch, heads, width, rank), dtype=state_dtype, device=device)
    sums = torch.empty((rows, segments, WIDTH, RANK), dtype=torch.float32, device=device)
    totals = torch.empty((rows, segments), dtype=torch.float32, device=device)
    state = None if state is None else state.contiguous()
    grid, extents = (rows, parts, segments), (length, heads, groups, width, rank, share)
    if hopper:
        ssd_hopper.scan(x, D, made, state, sums, totals, y, new_state, grid, extents, split)
        return y, new_state
    how |= {"CHANNELS": channels, "num_warps": num_warps or (4 if channels * RANK < 8192 else 8)}
    C_FORM = how.pop("C_FORM")
    launch(
        _sums_kernel,
        grid,
        *(x, B, made.weights, made.sizes, sums, totals, *extents),
        device=device,
        SPLIT=split,
        **how,
    )
    launch(
        _outputs_kernel,
        grid,
        *(x, B, C, D, made.weights, made.sizes, made.between, made.C_sizes),
        *(state, sums, totals, y, new_state, *extents),
        device=device,
        C_FORM=C_FORM,
        **how,
    )
    return y, new_state


def int8_ssd_scan_state(
    x_q: Tensor,
    x_scale: Tensor,
    dt_q: Tensor,
    dt_scale: Tensor,
    A: Tensor,
    B_q: Tensor,
    B_scale: Tensor,
    C_q: Tensor,
    C_scale: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    reverse: bool = False,
    **how: Any,
) -> tuple[Tensor, Tensor]:
    """Kernel of `ssmc.ops.int8_ssd_scan_state`; more precise than 16 bits its sums need not be."""
    operands = (x_q, x_scale, dt_q, dt_scale, A, B_q, B_scale, C_q, C_scale, D, dt_bias, state)
    how = {"split": state.dtype == torch.float32, **how}
    return int8_ssd_scan(*operands, dt_min, dt_max, reverse, state_dtype=state.dtype, **how)
