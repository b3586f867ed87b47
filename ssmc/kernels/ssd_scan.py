"""`int8_ssd_scan`: the scan of Mamba-2 over a prompt, all chunks side by side.

Dao and Gu, 'Transformers are SSMs' (arXiv 2405.21060), section 6, in four kernels. The first makes
B float16, which all heads of a group read: tensor cores take it as it lies there. The second
computes what each position weighs within its chunk. The third carries the state through the
chunks, a program a part of one head's state, and keeps the state in front of every chunk. In the
fourth every program computes the outputs of one chunk, of several heads of one group: what the
positions of the chunk give to one another, by C B', which these heads share, and what the state in
front of the chunk gives.

Precision. x, B and C are int8, hence exact in float16, and so is C B' in float32. What multiplies
them is rounded to float16 (11 bits, relative error 2e-4 of a term): the weights of positions in
one another, D among them, and the state in front of a chunk where it meets C. What is rounded is
first divided by a bound on it, so that float16 neither overflows nor, within 2^29 of the largest,
loses bits. What goes into the state is the sum of two float16 numbers, and the state stays in
float32 registers, so that it has about the precision of float32.

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

_PROGRAMS = 396  # three for each multiprocessor of a large GPU
_REGISTERS = 168  # a thread, of four warps: for three programs a multiprocessor
_CHANNELS = 64  # of the state a program, which loads B once for all of them
_ROWS = 16  # of B a program that makes them float16


@triton.jit
def _positions(chunk, length, REVERSE: tl.constexpr, CHUNK: tl.constexpr):  # noqa: ANN202
    """Positions of a chunk: (the first, int64; what to add, [T]; which of them there are, [T])."""
    s = tl.arange(0, CHUNK)
    start = chunk * CHUNK
    first = (length - 1 - start if REVERSE else start).to(tl.int64)
    return first, -s if REVERSE else s, s < length - start


@triton.jit
def _weights_kernel(
    x,
    dt,
    B,
    A,
    dt_bias,
    limits,
    weights,
    sizes,
    length,
    heads,
    group_size,
    width,
    rank,
    REVERSE: tl.constexpr,
    X_FORM: tl.constexpr,
    B_FORM: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    CHAIN: tl.constexpr,
) -> None:
    """A chunk of one head: weights [3, B H, L] and sizes [2, B H, L / T] as `chunk_weights`.

    The sizes are `whole` and `largest`; L is rounded up to whole chunks.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, chunks = tl.num_programs(0).to(tl.int64), tl.num_programs(1)
    batch, head = row // heads, row % heads
    t = chunk * CHUNK + tl.arange(0, CHUNK)
    start, position, valid = _positions(chunk, length, REVERSE, CHUNK)
    x_at, dt_at = of_head(x, batch, head, start), of_head(dt, batch, head, start)
    B_at = of_head(B, batch, head // group_size, start)
    rate = tl.load(A + head) * LOG2E
    bias = 0.0 if dt_bias is None else tl.load(dt_bias + head)
    step = step_sizes(dt_at[0], dt_at[1], dt, bias, limits, position, valid)
    _, x_factor = int8_rows(x_at[0], x_at[1], x, position, valid, width, WIDTH, X_FORM)
    _, B_factor = int8_rows(B_at[0], B_at[1], B, position, valid, rank, RANK, B_FORM)
    factor = x_factor * B_factor
    since, within, until_end, whole, largest = chunk_weights(step, rate, factor, CHUNK)
    await_inputs(CHAIN)
    weights += row * chunks * CHUNK + t
    plane = rows * chunks * CHUNK
    tl.store(weights, since)
    tl.store(weights + plane, within)
    tl.store(weights + 2 * plane, until_end)
    sizes += row * chunks + chunk
    tl.store(sizes, whole)
    tl.store(sizes + rows * chunks, largest)


@triton.jit
def _halves_kernel(
    B,
    halves,
    length,
    groups,
    rank,
    REVERSE: tl.constexpr,
    B_FORM: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    CHAIN: tl.constexpr,
) -> None:
    """ROWS positions of B of one group as float16 integers, in the order of the scan.

    halves is [B G, L, N], L rounded up to whole chunks.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, group = row // groups, row % groups
    s, n = tl.arange(0, ROWS), tl.arange(0, RANK)
    start, position, valid = _positions(block, length, REVERSE, ROWS)
    q, scale = of_head(B, batch, group, start)
    await_inputs(CHAIN)
    B_t, _ = int8_rows(q, scale, B, position, valid, rank, RANK, B_FORM)
    t = (row * tl.num_programs(1) + block) * ROWS + s
    tl.store(halves + t[:, None] * RANK + n[None, :], B_t)


@triton.jit
def _states_kernel(
    x,
    halves,
    state,
    until_end,
    sizes,
    before,
    bounds,
    new_state,
    length,
    heads,
    groups,
    width,
    rank,
    REVERSE: tl.constexpr,
    X_FORM: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    CHAIN: tl.constexpr,
) -> None:
    """CHANNELS of the state of one head, through all chunks.

    before [B H, L / T, N, P] is the state in front of each chunk as float16, times 2^15 / bounds
    [B H, L / T, P / CHANNELS]; P and N rounded up to powers of two.
    """
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    batch, head = row // heads, row % heads
    chunks = tl.cdiv(length, CHUNK)
    s, n, c = tl.arange(0, CHUNK), tl.arange(0, RANK), tl.arange(0, CHANNELS)
    p = part * CHANNELS + c
    until_end += row * chunks * CHUNK + s
    sizes += row * chunks
    plane = tl.num_programs(0).to(tl.int64) * chunks
    group = batch * groups + head // (heads // groups)
    halves += group * chunks * CHUNK * RANK + s[:, None] * RANK + n[None, :]
    before += row * chunks * WIDTH * RANK + n[:, None] * WIDTH + p[None, :]
    bounds += row * chunks * parts + part
    cell = (row * width + p)[None, :] * rank + n[:, None]
    in_cell = (p < width)[None, :] & (n < rank)[:, None]
    channel = tl.full([CHANNELS], 1.0, tl.float32)
    if X_FORM == "column":
        channel = tl.load(x[1] + head * x[3][2] + p * x[3][3], p < width, 0.0)
    h = tl.zeros([RANK, CHANNELS], tl.float32)
    if state is not None:
        h = tl.load(state + cell, in_cell, 0.0).to(tl.float32)
    bound = tl.maximum(tl.max(tl.abs(h)), SMALL)
    widest = tl.max(channel, 0) * (CHUNK * QMAX * QMAX)
    await_inputs(CHAIN)

    for chunk in tl.range(0, chunks, num_stages=STAGES):
        start, position, valid = _positions(chunk, length, REVERSE, CHUNK)
        x_at = of_head(x, batch, head, start)
        x_q, x_scale = x_at[0] + part * CHANNELS, x_at[1] + part * CHANNELS * x[3][3]
        left = width - part * CHANNELS
        x_t, _ = int8_rows(x_q, x_scale, x, position, valid, left, CHANNELS, X_FORM)
        B_t, weight = tl.load(halves + chunk * CHUNK * RANK), tl.load(until_end + chunk * CHUNK)
        whole, largest = tl.load(sizes + chunk), tl.load(sizes + plane + chunk)
        rounded = (h * (HALF_LIMIT / bound)).to(tl.float16)
        tl.store(before + chunk * WIDTH * RANK, rounded)
        tl.store(bounds + chunk * parts, bound)
        growing = state_update(x_t, B_t, weight, SPLIT)
        remains = tl.exp2(whole)
        h = tl.fma(growing, (channel * (largest * (1 / 256)))[None, :], h * remains)
        bound = tl.maximum(bound * remains + largest * widest, SMALL)
    tl.store(new_state + cell, h.to(new_state.dtype.element_ty), in_cell)


@triton.jit
def _outputs_kernel(
    x,
    B,
    C,
    D,
    weights,
    sizes,
    before,
    bounds,
    y,
    length,
    heads,
    groups,
    width,
    rank,
    together,
    REVERSE: tl.constexpr,
    X_FORM: tl.constexpr,
    B_FORM: tl.constexpr,
    C_FORM: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHAIN: tl.constexpr,
) -> None:
    """y of a chunk, of `together` heads of one group."""
    group_size = heads // groups
    blocks = tl.cdiv(group_size, together)
    block, chunk = tl.program_id(0), tl.program_id(1)
    chunks = tl.num_programs(1)
    batch, group = (block // (blocks * groups)).to(tl.int64), block // blocks % groups
    first = group * group_size + block % blocks * together
    end = tl.minimum(first + together, (group + 1) * group_size)
    rows = tl.num_programs(0) // (blocks * groups) * heads
    plane = rows.to(tl.int64) * chunks
    p, n, s = tl.arange(0, WIDTH), tl.arange(0, RANK), tl.arange(0, CHUNK)
    start, position, valid = _positions(chunk, length, REVERSE, CHUNK)
    B_at, C_at = of_head(B, batch, group, start), of_head(C, batch, group, start)
    B_t, _ = int8_rows(B_at[0], B_at[1], B, position, valid, rank, RANK, B_FORM)
    C_t, C_factor = int8_rows(C_at[0], C_at[1], C, position, valid, rank, RANK, C_FORM)
    # |C B'| is at most 127^2 RANK, so times 2 / RANK it is below half of the largest float16.
    C_largest = tl.maximum(tl.max(C_factor, 0), SMALL)
    between = tl.dot(C_t, tl.trans(B_t)) * (C_factor * (2.0 / RANK / C_largest))[:, None]
    between = tl.where(s[:, None] >= s[None, :], between, 0.0)
    await_inputs(CHAIN)

    for head in range(first, end):
        row = batch * heads + head
        x_at = of_head(x, batch, head, start)
        here = row * chunks + chunk
        x_t, x_factor = int8_rows(x_at[0], x_at[1], x, position, valid, width, WIDTH, X_FORM)
        since = tl.load(weights + here * CHUNK + s)
        within = tl.load(weights + (plane + here) * CHUNK + s)
        whole, largest = tl.load(sizes + here), tl.load(sizes + plane + here)
        channel = tl.full([WIDTH], 1.0, tl.float32)
        if X_FORM == "column":
            channel = tl.load(x[1] + head * x[3][2] + p * x[3][3], p < width, 0.0)

        # D stands on the diagonal of the weights: `unit` is a bound on these, D and 2^-15.
        size = C_largest * (largest * (RANK / 2.0))
        unit = tl.maximum(size, SMALL)
        if D is not None:
            skip = tl.load(D + head)
            x_largest = 1.0 if X_FORM == "column" else tl.max(x_factor, 0)
            unit = tl.maximum(unit, tl.abs(skip) * (x_largest * (1 / HALF_LIMIT)))
        # The exponents of what counts are never above zero.
        exponent = (since - tl.maximum(whole, 0.0))[:, None] - since[None, :]
        decay = fast_exp2(tl.minimum(exponent, 0.0))
        weight = (between * (within * (size / unit))[None, :]) * decay
        if D is not None:
            weight = tl.where(
                s[:, None] == s[None, :], weight + (x_factor * (skip / unit))[:, None], weight
            )
        inside = tl.dot(weight.to(tl.float16), x_t)

        h = tl.load(before + here * WIDTH * RANK + n[:, None] * WIDTH + p[None, :])
        bound = tl.load(bounds + here * (WIDTH // CHANNELS) + p // CHANNELS) * (1 / HALF_LIMIT)
        inside *= (channel * unit)[None, :]
        since_start = (C_factor * fast_exp2(since))[:, None] * bound[None, :]
        result = tl.fma(tl.dot(C_t, h), since_start, inside)
        at = y + ((batch * length + start) * heads + head) * width
        at += (position * (heads * width))[:, None] + p[None, :]
        tl.store(at, result, valid[:, None] & (p < width)[None, :])


def _together(blocks: int, group_size: int) -> int:
    """Heads a program, of which there are `blocks` (one a head and chunk) if it takes one."""
    return min(group_size, max(1, triton.cdiv(blocks, _PROGRAMS)))


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
    together: int | None = None,
    split: bool = True,
    state_dtype: torch.dtype = torch.float32,
    num_warps: int | None = None,
    num_stages: int = 2,
    maxnreg: int | None = None,
    state_warps: int | None = None,
    state_stages: int = 3,
) -> tuple[Tensor, Tensor]:
    """`ssmc.ops.int8_ssd_scan`: x_q [B, L, H, P], B_q and C_q [B, L, G, N] int8; any length.

    Integers may be views with adjacent channels, scales are any that broadcast. Returns y float32
    [B, L, H, P] to about 3e-4 and the new state [B, H, P, N] to about 3e-6; the state given stays
    as it is and may be of 16 bits, the new one has `state_dtype`. `chunk` positions (a power of
    two, at least 16) are one matrix product. A program carries `channels` (likewise) of the state
    of one head, and writes y of `together` heads. Without `split` the state is as precise as y.
    Warps, stages and registers are those of the kernel that writes y, state_warps and state_stages
    those of the one that carries the state.
    """
    batch, length, heads, width = x_q.shape
    groups, rank = B_q.shape[2:]
    rows, device = batch * heads, x_q.device
    chunk = chunk or min(64, max(16, triton.next_power_of_2(length)))
    chunks = triton.cdiv(length, chunk)
    WIDTH, RANK = (max(16, triton.next_power_of_2(n)) for n in (width, rank))
    x, dt = operand(x_q, x_scale), operand(dt_q, dt_scale)
    B, C = operand(B_q, B_scale), operand(C_q, C_scale)
    X_FORM, B_FORM = form(x, "column", "row"), form(B, "row")
    # Rows of x that are scaled anew need all of their columns.
    channels = WIDTH if X_FORM == "any" else min(channels or _CHANNELS, WIDTH)
    group_size = heads // groups

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    y = empty(*x_q.shape)
    new_state = empty(batch, heads, width, rank, dtype=state_dtype)
    weights, sizes = empty(3, rows, chunks * chunk), empty(2, rows, chunks)
    halves = empty(batch * groups, chunks * chunk, RANK, dtype=torch.float16)
    before = empty(rows, chunks, RANK, WIDTH, dtype=torch.float16)
    bounds = empty(rows, chunks, WIDTH // channels)
    state = None if state is None else state.contiguous()
    how = {"REVERSE": reverse, "RANK": RANK}
    launch(
        _halves_kernel,
        (batch * groups, chunks * chunk // _ROWS),
        *(B, halves, length, groups, rank),
        device=device,
        B_FORM=B_FORM,
        ROWS=_ROWS,
        num_warps=2,
        **how,
    )
    how |= {"X_FORM": X_FORM, "CHUNK": chunk, "WIDTH": WIDTH}
    launch(
        _weights_kernel,
        (rows, chunks),
        *(x, dt, B, A, dt_bias, (dt_min, dt_max), weights, sizes),
        *(length, heads, group_size, width, rank),
        device=device,
        B_FORM=B_FORM,
        num_warps=1,
        **how,
    )
    launch(
        _states_kernel,
        (rows, WIDTH // channels),
        *(x, halves, state, weights[2], sizes, before, bounds, new_state),
        *(length, heads, groups, width, rank),
        device=device,
        CHANNELS=channels,
        SPLIT=split,
        STAGES=state_stages,
        num_warps=state_warps or max(4, channels // 8),
        **how,
    )
    num_warps = num_warps or (4 if chunk <= 64 and WIDTH * RANK <= 8192 else 8)
    together = together or _together(rows * chunks, group_size)
    launch(
        _outputs_kernel,
        (batch * groups * triton.cdiv(group_size, together), chunks),
        *(x, B, C, D, weights, sizes, before, bounds, y),
        *(length, heads, groups, width, rank, together),
        device=device,
        B_FORM=B_FORM,
        C_FORM=form(C, "row"),
        CHANNELS=channels,
        num_warps=num_warps,
        num_stages=num_stages,
        maxnreg=maxnreg or (_REGISTERS if num_warps == 4 else None),
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
