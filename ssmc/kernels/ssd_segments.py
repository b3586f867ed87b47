"""`int8_ssd_scan`: the scan of Mamba-2 over a prompt, in matrix products.

Dao and Gu, 'Transformers are SSMs' (arXiv 2405.21060), section 6, at two levels. A prompt is cut
into segments, a segment into chunks. One kernel computes what each position weighs within its
chunk, and what each segment but the last adds to the state. In a second one every program folds
what lies in front of its segment into its first state, and then goes through the chunks of the
segment in order, the state in registers.

Precision. x, B and C are int8, hence exact in float16, and so is C B' in float32. What multiplies
them is rounded to float16 (11 bits, relative error 2e-4 of a term): the weights of positions in
one another, and the state where it meets C. Other factors stay in float32 outside of the products,
and what is rounded is first divided by a bound on it, so that float16 neither overflows nor, within
2^29 of the largest, loses bits. What goes into the state is the sum of two float16 numbers, so the
state has about the precision of float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels.arithmetic import LOG2E
from ssmc.kernels.launch import await_inputs, launch
from ssmc.kernels.ssd_operands import (
    HALF_LIMIT,
    QMAX,
    SMALL,
    chunk_weights,
    fast_exp2,
    form,
    int8_rows,
    of_head,
    operand,
    state_update,
    step_sizes,
)

_PROGRAMS = 264  # two for each multiprocessor of a large GPU: what its registers hold
_MOST_SEGMENTS = 8  # since each is folded by all that follow it


@triton.jit
def _prepare_segment(  # noqa: ANN202
    x,
    dt,
    B,
    x_at,
    dt_at,
    B_at,
    rate,
    bias,
    limits,
    channel,
    weights,
    largest,
    first,
    end,
    length,
    width,
    rank,
    ADD: tl.constexpr,
    REVERSE: tl.constexpr,
    X_FORM: tl.constexpr,
    B_FORM: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Write the weights of a segment; return (its addition to the state, the log of its decay)."""
    h = tl.zeros([WIDTH, RANK], tl.float32)
    decay = 0.0
    for start in range(first, end, CHUNK):
        t = start + tl.arange(0, CHUNK)
        valid = t < end
        position = (length - 1 - t if REVERSE else t).to(tl.int64)
        step = step_sizes(dt_at[0], dt_at[1], dt, bias, limits, position, valid)
        x_t, x_factor = int8_rows(x_at[0], x_at[1], x, position, valid, width, WIDTH, X_FORM)
        B_t, B_factor = int8_rows(B_at[0], B_at[1], B, position, valid, rank, RANK, B_FORM)
        factor = x_factor * B_factor
        since, within, until_end, whole, top = chunk_weights(step, rate, factor, CHUNK)
        tl.store(weights[0] + t, since)
        tl.store(weights[1] + t, within)
        tl.store(weights[2] + t, until_end)
        tl.store(largest + start // CHUNK, top)
        if ADD:
            growing = state_update(x_t, B_t, until_end, SPLIT)
            h = h * tl.exp2(whole) + growing * (channel * (top / 256.0))[:, None]
        decay += whole
    return h, decay


@triton.jit
def _prepare_kernel(
    x,
    dt,
    B,
    A,
    dt_bias,
    limits,
    weights,
    largest,
    added,
    decay,
    length,
    heads,
    group_size,
    width,
    rank,
    segment_length,
    segments,
    REVERSE: tl.constexpr,
    X_FORM: tl.constexpr,
    B_FORM: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    CHAIN: tl.constexpr,
) -> None:
    """A segment of one head: the weights of its positions, and what it does to the state.

    weights [3, B H, L] (L up to whole chunks) and largest [B H, L / T] as `chunk_weights` has them;
    added [B H, S - 1, P, N] and decay [B H, S - 1], a base-2 logarithm, of all segments but the
    last. x, dt and B are operands as `operand` makes them.
    """
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = row // heads, row % heads
    x_at, dt_at = of_head(x, batch, head), of_head(dt, batch, head)
    B_at = of_head(B, batch, head // group_size)
    chunks = tl.cdiv(length, CHUNK)
    plane = tl.num_programs(0).to(tl.int64) * chunks * CHUNK
    since = weights + row * chunks * CHUNK
    rows = (since, since + plane, since + 2 * plane)
    largest += row * chunks
    first = segment * segment_length
    end = tl.minimum(first + segment_length, length)
    rate = tl.load(A + head) * LOG2E
    bias = 0.0 if dt_bias is None else tl.load(dt_bias + head)
    p, n = tl.arange(0, WIDTH), tl.arange(0, RANK)
    channel = tl.full([WIDTH], 1.0, tl.float32)
    if X_FORM == "column":
        channel = tl.load(x_at[1] + p * x[3][3], p < width, 0.0)
    await_inputs(CHAIN)
    if segment == segments - 1:
        _prepare_segment(
            *(x, dt, B, x_at, dt_at, B_at, rate, bias, limits, channel, rows, largest),
            *(first, end, length, width, rank, False, REVERSE),
            *(X_FORM, B_FORM, CHUNK, WIDTH, RANK, SPLIT),
        )
    else:
        h, total = _prepare_segment(
            *(x, dt, B, x_at, dt_at, B_at, rate, bias, limits, channel, rows, largest),
            *(first, end, length, width, rank, True, REVERSE),
            *(X_FORM, B_FORM, CHUNK, WIDTH, RANK, SPLIT),
        )
        slot = row * (segments - 1) + segment
        tile = p[:, None] * rank + n[None, :]
        in_tile = (p < width)[:, None] & (n < rank)[None, :]
        tl.store(added + slot * width * rank + tile, h, in_tile)
        tl.store(decay + slot, total)


@triton.jit
def _scan_kernel(
    x,
    B,
    C,
    D,
    state,
    weights,
    largest,
    added,
    decay,
    y,
    new_state,
    length,
    heads,
    group_size,
    width,
    rank,
    segment_length,
    segments,
    REVERSE: tl.constexpr,
    X_FORM: tl.constexpr,
    B_FORM: tl.constexpr,
    C_FORM: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    CHAIN: tl.constexpr,
) -> None:
    """A segment of one head: y, and behind the last one the new state."""
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = row // heads, row % heads
    group = head // group_size
    x_at = of_head(x, batch, head)
    B_at, C_at = of_head(B, batch, group), of_head(C, batch, group)
    chunks = tl.cdiv(length, CHUNK)
    plane = tl.num_programs(0).to(tl.int64) * chunks * CHUNK
    weights += row * chunks * CHUNK
    largest += row * chunks
    p, n, s = tl.arange(0, WIDTH), tl.arange(0, RANK), tl.arange(0, CHUNK)
    tile = p[:, None] * rank + n[None, :]
    in_tile = (p < width)[:, None] & (n < rank)[None, :]
    size = width * rank
    skip = 0.0 if D is None else tl.load(D + head)
    channel = tl.full([WIDTH], 1.0, tl.float32)
    if X_FORM == "column":
        channel = tl.load(x_at[1] + p * x[3][3], p < width, 0.0)
    widest = tl.max(channel, 0)
    await_inputs(CHAIN)

    h = tl.zeros([WIDTH, RANK], tl.float32)
    if state is not None:
        h = tl.load(state + row * size + tile, in_tile, 0.0)
    for slot in range(row * (segments - 1), row * (segments - 1) + segment):
        before = tl.load(added + slot * size + tile, in_tile, 0.0)
        h = h * tl.exp2(tl.load(decay + slot)) + before
    bound = tl.maximum(tl.max(tl.abs(h)), SMALL)
    first = segment * segment_length
    end = tl.minimum(first + segment_length, length)
    for start in range(first, end, CHUNK):
        t = start + s
        valid = t < end
        position = (length - 1 - t if REVERSE else t).to(tl.int64)
        x_t, x_factor = int8_rows(x_at[0], x_at[1], x, position, valid, width, WIDTH, X_FORM)
        B_t, _ = int8_rows(B_at[0], B_at[1], B, position, valid, rank, RANK, B_FORM)
        C_t, C_factor = int8_rows(C_at[0], C_at[1], C, position, valid, rank, RANK, C_FORM)
        since = tl.load(weights + t)
        within = tl.load(weights + plane + t)
        until_end = tl.load(weights + 2 * plane + t)
        whole = tl.load(weights + start + CHUNK - 1)
        top = tl.load(largest + start // CHUNK)

        # |C B'| is at most 127^2 RANK, so times 4 / RANK it is below the largest float16, 65504.
        exponent = (since - tl.maximum(whole, 0.0))[:, None] - since[None, :]
        exponent = tl.where(s[:, None] >= s[None, :], exponent, float("-inf"))
        between = tl.dot(C_t, tl.trans(B_t)) * (within * (4.0 / RANK))[None, :]
        inside = tl.dot((between * fast_exp2(exponent)).to(tl.float16), x_t)
        earlier = tl.dot(C_t, tl.trans((h * (HALF_LIMIT / bound)).to(tl.float16)))
        result = inside * (C_factor * (top * (RANK / 4.0)))[:, None]
        if D is not None:
            result = tl.fma(x_t.to(tl.float32), (x_factor * skip)[:, None], result)
        weight = C_factor * fast_exp2(since) * (bound * (1 / HALF_LIMIT))
        result = tl.fma(earlier, weight[:, None], result * channel[None, :])
        at = y + ((batch * length + position) * heads + head) * width
        tl.store(at[:, None] + p[None, :], result, valid[:, None] & (p < width)[None, :])

        growing = state_update(x_t, B_t, until_end, SPLIT)
        remains = tl.exp2(whole)
        h = tl.fma(growing, (channel * (top * (1 / 256)))[:, None], h * remains)
        bound = tl.maximum(bound * remains + top * widest * (CHUNK * QMAX * QMAX), SMALL)
    if segment == segments - 1:
        tl.store(new_state + row * size + tile, h, in_tile)


def _segments(rows: int, chunks: int) -> int:
    """As many segments as run side by side, for so many sequences and heads."""
    return max(1, min(chunks, _MOST_SEGMENTS, _PROGRAMS // rows))


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
    segments: int | None = None,
    split: bool = True,
    num_warps: int | None = None,
    num_stages: int = 2,
    maxnreg: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssmc.ops.int8_ssd_scan`: x_q [B, L, H, P], B_q and C_q [B, L, G, N] int8; any length.

    Integers may be views with adjacent channels, scales are any that broadcast. Returns y float32
    [B, L, H, P] to about 3e-4 and the new state [B, H, P, N] to about 3e-6; the state given stays
    as it is. `chunk` positions (a power of two, at least 16) are one matrix product; a sequence is
    cut into `segments`, which run side by side; without `split` the state is as precise as y.
    """
    batch, length, heads, width = x_q.shape
    groups, rank = B_q.shape[2:]
    device = x_q.device
    chunk = chunk or min(64, max(16, triton.next_power_of_2(length)))
    chunks = triton.cdiv(length, chunk)
    segment_length = chunk * triton.cdiv(chunks, segments or _segments(batch * heads, chunks))
    segments = max(1, triton.cdiv(length, segment_length))
    WIDTH, RANK = (max(16, triton.next_power_of_2(n)) for n in (width, rank))
    x, dt = operand(x_q, x_scale), operand(dt_q, dt_scale)
    B, C = operand(B_q, B_scale), operand(C_q, C_scale)
    y, new_state, weights, largest, added, decay = (
        torch.empty(shape, dtype=torch.float32, device=device)
        for shape in (
            x_q.shape,
            (batch, heads, width, rank),
            (3, batch * heads, chunks * chunk),
            (batch * heads, chunks),
            (batch * heads, segments - 1, width, rank),
            (batch * heads, segments - 1),
        )
    )
    state = None if state is None else state.contiguous()
    between = (weights, largest, added, decay)
    sizes = (length, heads, heads // groups, width, rank, segment_length, segments)
    how = {
        "REVERSE": reverse,
        "X_FORM": form(x, "column", "row"),
        "B_FORM": form(B, "row"),
        "CHUNK": chunk,
        "WIDTH": WIDTH,
        "RANK": RANK,
        "SPLIT": split,
        "num_warps": num_warps or (4 if max(chunk * chunk, WIDTH * RANK) <= 8192 else 8),
        "num_stages": num_stages,
        "maxnreg": maxnreg,
    }
    grid = (batch * heads, segments)
    prepared = (x, dt, B, A, dt_bias, (dt_min, dt_max), *between, *sizes)
    launch(_prepare_kernel, grid, *prepared, device=device, **how)
    scanned = (x, B, C, D, state, *between, y, new_state, *sizes)
    launch(_scan_kernel, grid, *scanned, device=device, C_FORM=form(C, "row"), **how)
    return y, new_state
