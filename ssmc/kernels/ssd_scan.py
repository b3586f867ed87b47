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
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels.arithmetic import LOG2E, softplus
from ssmc.kernels.launch import INTERPRETED, await_inputs, launch

_INTERPRETED = tl.constexpr(INTERPRETED)
_QMAX = tl.constexpr(127.0)
_HALF_LIMIT = tl.constexpr(32768.0)  # leaves a factor of 2 below the largest float16
_SMALL = tl.constexpr(1e-30)  # in place of a bound of zero; its inverse is still finite
_PROGRAMS = 264  # two for each multiprocessor of a large GPU: what its registers hold
_MOST_SEGMENTS = 8  # since each is folded by all that follow it


@triton.jit
def _exp2(x):  # noqa: ANN202
    """2^x, zero below the normal numbers: without the instructions that would keep those."""
    if _INTERPRETED:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def _to_half(q):  # noqa: ANN202
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
def _of_head(operand, batch, head):  # noqa: ANN202
    """Pointers to the first position of (integers, scales) of one sequence and head."""
    q, scale, steps, scale_steps = operand
    q += batch * steps[0] + head * steps[2]
    return q, scale + batch * scale_steps[0] + head * scale_steps[2]


@triton.jit
def _int8_rows(  # noqa: ANN202
    q, scale, operand, position, valid, width, COLUMNS: tl.constexpr, FORM: tl.constexpr
):
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
        factor = tl.maximum(tl.max(tl.abs(real), 1), _SMALL) / _QMAX
        integers = (real / factor[:, None]).to(tl.float16)
    else:
        integers = _to_half(values)
        factor = tl.full([position.shape[0]], 1.0, tl.float32)
        if FORM == "row":
            factor = tl.load(rows, valid, 0.0)
    return integers, factor


@triton.jit
def _step_sizes(q, scale, operand, bias, limits, position, valid):  # noqa: ANN202
    """dt of a chunk [T], zero behind the end."""
    steps, scale_steps = operand[2], operand[3]
    dt = tl.load(q + position * steps[1], valid, 0).to(tl.float32)
    dt = softplus(dt * tl.load(scale + position * scale_steps[1], valid, 0.0) + bias)
    return tl.where(valid, tl.minimum(tl.maximum(dt, limits[0]), limits[1]), 0.0)


@triton.jit
def _weights(dt, rate, factor, CHUNK: tl.constexpr):  # noqa: ANN202
    """What the positions of a chunk weigh in those behind them: three rows [T], two numbers.

    `since`: the base-2 logarithm of the decay since the chunk's start; `whole` that of all of it,
    positive where A is. Position s weighs dt factor 2^(since[t] - since[s]) in position t, that is
    `largest` within[s] 2^(since[t] - since[s] - max(whole, 0)), and in the chunk's end `largest`
    until_end[s] / 256: within and what follows it are at most 1.
    """
    since = tl.cumsum(dt * rate, 0)
    whole = tl.sum(tl.where(tl.arange(0, CHUNK) == CHUNK - 1, since, 0.0), 0)
    growth = tl.maximum(whole, 0.0)
    factor *= dt
    largest = tl.maximum(tl.max(tl.abs(factor), 0), _SMALL)
    within = factor / largest
    until_end = within * tl.exp2(whole - growth - since) * 256.0
    return since, within, until_end, whole, largest * tl.exp2(growth)


@triton.jit
def _added(x, B, until_end, SPLIT: tl.constexpr):  # noqa: ANN202
    """(until_end x)' B for x [T, P], B [T, N], until_end [T]; float32 [P, N]."""
    weighted = x.to(tl.float32) * until_end[:, None]
    high = weighted.to(tl.float16)
    added = tl.dot(tl.trans(high), B)
    if SPLIT:
        low = (weighted - high.to(tl.float32)).to(tl.float16)
        added = tl.dot(tl.trans(low), B, added)
    return added


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
        step = _step_sizes(dt_at[0], dt_at[1], dt, bias, limits, position, valid)
        x_t, x_factor = _int8_rows(x_at[0], x_at[1], x, position, valid, width, WIDTH, X_FORM)
        B_t, B_factor = _int8_rows(B_at[0], B_at[1], B, position, valid, rank, RANK, B_FORM)
        factor = x_factor * B_factor
        since, within, until_end, whole, top = _weights(step, rate, factor, CHUNK)
        tl.store(weights[0] + t, since)
        tl.store(weights[1] + t, within)
        tl.store(weights[2] + t, until_end)
        tl.store(largest + start // CHUNK, top)
        if ADD:
            growing = _added(x_t, B_t, until_end, SPLIT)
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

    weights [3, B H, L] (L up to whole chunks) and largest [B H, L / T] as `_weights` has them;
    added [B H, S - 1, P, N] and decay [B H, S - 1], a base-2 logarithm, of all segments but the
    last. x, dt and B are operands as `_operand` makes them.
    """
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = row // heads, row % heads
    x_at, dt_at = _of_head(x, batch, head), _of_head(dt, batch, head)
    B_at = _of_head(B, batch, head // group_size)
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
    x_at = _of_head(x, batch, head)
    B_at, C_at = _of_head(B, batch, group), _of_head(C, batch, group)
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
    bound = tl.maximum(tl.max(tl.abs(h)), _SMALL)
    first = segment * segment_length
    end = tl.minimum(first + segment_length, length)
    for start in range(first, end, CHUNK):
        t = start + s
        valid = t < end
        position = (length - 1 - t if REVERSE else t).to(tl.int64)
        x_t, x_factor = _int8_rows(x_at[0], x_at[1], x, position, valid, width, WIDTH, X_FORM)
        B_t, _ = _int8_rows(B_at[0], B_at[1], B, position, valid, rank, RANK, B_FORM)
        C_t, C_factor = _int8_rows(C_at[0], C_at[1], C, position, valid, rank, RANK, C_FORM)
        since = tl.load(weights + t)
        within = tl.load(weights + plane + t)
        until_end = tl.load(weights + 2 * plane + t)
        whole = tl.load(weights + start + CHUNK - 1)
        top = tl.load(largest + start // CHUNK)

        # |C B'| is at most 127^2 RANK, so times 4 / RANK it is below the largest float16, 65504.
        exponent = (since - tl.maximum(whole, 0.0))[:, None] - since[None, :]
        exponent = tl.where(s[:, None] >= s[None, :], exponent, float("-inf"))
        between = tl.dot(C_t, tl.trans(B_t)) * (within * (4.0 / RANK))[None, :]
        inside = tl.dot((between * _exp2(exponent)).to(tl.float16), x_t)
        earlier = tl.dot(C_t, tl.trans((h * (_HALF_LIMIT / bound)).to(tl.float16)))
        result = inside * (C_factor * (top * (RANK / 4.0)))[:, None]
        if D is not None:
            result = tl.fma(x_t.to(tl.float32), (x_factor * skip)[:, None], result)
        weight = C_factor * _exp2(since) * (bound * (1 / _HALF_LIMIT))
        result = tl.fma(earlier, weight[:, None], result * channel[None, :])
        at = y + ((batch * length + position) * heads + head) * width
        tl.store(at[:, None] + p[None, :], result, valid[:, None] & (p < width)[None, :])

        growing = _added(x_t, B_t, until_end, SPLIT)
        remains = tl.exp2(whole)
        h = tl.fma(growing, (channel * (top * (1 / 256)))[:, None], h * remains)
        bound = tl.maximum(bound * remains + top * widest * (CHUNK * _QMAX * _QMAX), _SMALL)
    if segment == segments - 1:
        tl.store(new_state + row * size + tile, h, in_tile)


def _steps(x: Tensor) -> tuple[int, ...]:
    """Strides, zero in dimensions of one element."""
    return tuple(0 if n == 1 else step for n, step in zip(x.shape, x.stride(), strict=True))


def _operand(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...], tuple[int, ...]]:
    """(integers, scales, strides of either), where the channels of q [B, L, ..] are adjacent."""
    if q.dim() == 4 and q.stride(3) != 1 and q.shape[3] > 1:
        q = q.contiguous()
    return q, scale, _steps(q), _steps(scale.expand(q.shape))


def _form(operand: tuple[Any, ...], *forms: str) -> str:
    """The first of `forms` ('row', 'column') that holds for the scale of an operand, or 'any'."""
    batch, step, _, channel = operand[3]
    holds = {"row": channel == 0, "column": batch == 0 and step == 0}
    return next((form for form in forms if holds[form]), "any")


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
    x, dt = _operand(x_q, x_scale), _operand(dt_q, dt_scale)
    B, C = _operand(B_q, B_scale), _operand(C_q, C_scale)
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
        "X_FORM": _form(x, "column", "row"),
        "B_FORM": _form(B, "row"),
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
    launch(_scan_kernel, grid, *scanned, device=device, C_FORM=_form(C, "row"), **how)
    return y, new_state
