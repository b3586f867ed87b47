"""`selective_scan_step` of many sequences: dt_proj by the tensor cores, the states part by part.

What a step costs is its states, read and written once. All else is to be out of their way: a thread
has few registers, so that all programs run at a time, and what is one for many states (step sizes,
B and C) is computed once and handed over through memory.
"""

# A tuple of parts grows in a loop that Triton unrolls; it knows no starred expressions.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,unreachable"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels.arithmetic import (
    LOG2E,
    inverse_of,
    parameter,
    scale_for,
    silu,
    softplus,
    to_float,
    to_int8,
    to_int8_within,
)
from ssmc.kernels.launch import await_inputs, launch, let_next_load
from ssmc.kernels.prefetch import prefetch

FEWEST = 16  # sequences and channels a program: what an instruction of the tensor cores takes
DEEPEST = 1024  # columns of dt_proj: so far every sum is a float32
_AHEAD = 2  # parts of the states that are on their way while one is advanced


@triton.jit
def _columns(rows, kept, rank, K: tl.constexpr, MORE_K: tl.constexpr):
    """`rank` columns of the rows pointed at, [rows, K] and, where there are more, [rows, MORE_K].

    Zeros where a row is not kept and past the last column.
    """
    k = tl.arange(0, K)
    first = tl.load(rows + k[None, :], mask=kept[:, None] & (k < rank)[None, :], other=0)
    if MORE_K == 0:
        return (first,)
    else:
        k = K + tl.arange(0, MORE_K)
        more = tl.load(rows + k[None, :], mask=kept[:, None] & (k < rank)[None, :], other=0)
        return first, more


@triton.jit
def _product(x, w):
    """Integers in float32 [S, D] of the columns of x [S, ...] and w [D, ...], and a scale a row.

    The rows of x are quantised as by `quantize_dynamic`.
    """
    largest = tl.max(tl.abs(x[0]), 1)
    for i in tl.static_range(1, len(x)):
        largest = tl.maximum(largest, tl.max(tl.abs(x[i]), 1))
    scale = scale_for(largest)[:, None]
    inverse = inverse_of(scale)
    total = tl.dot(to_int8_within(x[0], inverse), tl.trans(w[0]), out_dtype=tl.int32)
    for i in tl.static_range(1, len(x)):
        q = to_int8_within(x[i], inverse)
        total = tl.dot(q, tl.trans(w[i]), total, out_dtype=tl.int32)
    return total.to(tl.float32), scale


@triton.jit
def _rounded(values):
    """Rows [S, 2, N], each quantised as by `quantize_dynamic`, and dequantised."""
    scale = scale_for(tl.max(tl.abs(values), 2))[:, :, None]
    return to_float(to_int8_within(values, inverse_of(scale))) * scale


@triton.jit
def _states_at(state, first, channel, batch, width, states, PART: tl.constexpr, N: tl.constexpr):
    """Where the states [PART, channels, N] of sequences first .. first + PART are, and a mask."""
    sequence = first + tl.arange(0, PART)
    n = tl.arange(0, N)
    inside = (channel < width)[:, None] & (n < states)[None, :]
    cell = channel[:, None] * states + n[None, :]
    at = state + sequence.to(tl.int64)[:, None, None] * (width * states) + cell[None, :, :]
    return at, (sequence < batch)[:, None, None] & inside[None, :, :]


@triton.jit
def _load_states(state, first, channel, batch, width, states, PART: tl.constexpr, N: tl.constexpr):
    at, mask = _states_at(state, first, channel, batch, width, states, PART, N)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _take(board, first, PART: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr):
    """Of rows first .. first + PART of the board dt, dt u [PART, BLOCK_D], B and C [PART, N]."""
    d = tl.arange(0, BLOCK_D)[None, :]
    n = 2 * BLOCK_D + tl.arange(0, N)[None, :]
    row = board + (first + tl.arange(0, PART))[:, None] * (2 * BLOCK_D + 2 * N)
    return tl.load(row + d), tl.load(row + BLOCK_D + d), tl.load(row + n), tl.load(row + N + n)


@triton.jit
def _joined(x, COUNT: tl.constexpr):
    """A tuple of COUNT tensors, a power of two, as one: its last dimensions number them."""
    if COUNT == 1:
        return x[0]
    else:
        HALF: tl.constexpr = COUNT // 2
        pairs = ()
        for i in tl.static_range(HALF):
            pairs = pairs + (tl.join(x[i], x[i + HALF]),)
        return _joined(pairs, HALF)


@triton.jit
def _rows(parts):
    """Parts [P, D], a power of two of them, one below the other; no data moves."""
    P: tl.constexpr = parts[0].shape[0]
    D: tl.constexpr = parts[0].shape[1]
    COUNT: tl.constexpr = len(parts)
    x = tl.reshape(_joined(parts, COUNT), (P, D, COUNT))
    return tl.reshape(tl.permute(x, (2, 0, 1)), (COUNT * P, D))


@triton.jit
def _steps_kernel(  # noqa: C901
    x_proj,
    dt_w_q,
    dt_w_scale,
    dt_proj_bias,
    dt_scale,
    u_q,
    u_scale,
    A,
    D,
    z_q,
    z_scale,
    dt_bias,
    state,
    y,
    boards,
    batch,
    width,
    rank,
    states,
    x_row,
    u_row,
    z_row,
    dt_w_scale_stride,
    dt_scale_stride,
    u_scale_stride,
    z_scale_stride,
    SOFTPLUS: tl.constexpr,
    S: tl.constexpr,
    PART: tl.constexpr,
    AHEAD: tl.constexpr,
    K: tl.constexpr,
    MORE_K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """BLOCK_D channels of S sequences, whose states are advanced PART sequences at a time.

    `boards` are float32 [programs, S, 2 BLOCK_D + 2 N], one to hand over through for each program.
    The weight and all that belongs to a channel are read before the inputs are waited for, and the
    states, which may not be read so early, are brought into the L2 cache.
    """
    first = tl.program_id(1) * S
    sequence = first + tl.arange(0, S)
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    there = sequence < batch
    kept = channel < width
    row = tl.minimum(sequence, batch - 1).to(tl.int64)[:, None]
    n = tl.arange(0, N)
    if CHAIN:
        SECTOR: tl.constexpr = 256 // state.dtype.element_ty.primitive_bitwidth  # 32 bytes
        own = state + (row * width + tl.minimum(channel, width - 1)[None, :]) * states
        for i in tl.static_range(0, N, SECTOR):
            prefetch(own + tl.minimum(i, states - 1))
    w = _columns(dt_w_q + channel.to(tl.int64)[:, None] * rank, kept, rank, K, MORE_K)
    w_scale = parameter(dt_w_scale, dt_w_scale_stride, channel, width)
    dt_s = parameter(dt_scale, dt_scale_stride, channel, width)
    u_s = parameter(u_scale, u_scale_stride, channel, width)
    z_s = parameter(z_scale, z_scale_stride, channel, width)
    proj_bias = parameter(dt_proj_bias, 1, channel, width)
    bias = parameter(dt_bias, 1, channel, width)
    skip = parameter(D, 1, channel, width)
    inside = kept[:, None] & (n < states)[None, :]
    rate = tl.load(A + channel[:, None] * states + n[None, :], mask=inside, other=0.0)
    let_next_load(CHAIN)
    await_inputs(CHAIN)

    held = ()
    for i in tl.static_range(AHEAD):
        begin = first + i * PART
        held = held + (_load_states(state, begin, channel, batch, width, states, PART, N),)
    # All that is read of the inputs is asked for before any of it is waited for.
    mask = there[:, None] & kept[None, :]
    u = tl.load(u_q + row * u_row + channel[None, :], mask=mask, other=0).to(tl.float32)
    low = _columns(x_proj + row * x_row, there, rank, K, MORE_K)
    pair = tl.arange(0, 2)[:, None] * states + n[None, :]
    known = there[:, None, None] & (n < states)[None, None, :]
    BC = tl.load((x_proj + row * x_row + rank)[:, :, None] + pair[None, :, :], known, 0.0)
    if z_q is not None:
        z = tl.load(z_q + row * z_row + channel[None, :], mask=mask, other=0)

    total, low_s = _product(low, w)
    dt = total * (low_s * w_scale[None, :])
    if dt_proj_bias is not None:
        dt += proj_bias[None, :]
    dt = to_float(to_int8(dt, inverse_of(dt_s)[None, :])) * dt_s[None, :] + bias[None, :]
    if SOFTPLUS:
        dt = softplus(dt)
    u *= u_s[None, :]
    WIDTH: tl.constexpr = 2 * BLOCK_D + 2 * N
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    board = boards + program * (S * WIDTH)
    line = board + tl.arange(0, S)[:, None] * WIDTH
    d = tl.arange(0, BLOCK_D)
    tl.store(line + d[None, :], dt)
    tl.store(line + BLOCK_D + d[None, :], dt * u)
    tokens = tl.reshape(_rounded(BC), (S, 2 * N))
    tl.store(line + 2 * BLOCK_D + tl.arange(0, 2 * N)[None, :], tokens)
    tl.debug_barrier()

    rate *= LOG2E
    sums = ()
    following = _take(board, 0, PART, BLOCK_D, N)
    for i in tl.static_range(S // PART):
        step, step_u, B, C = following
        if i + AHEAD < S // PART:
            begin = first + (i + AHEAD) * PART
            held = held + (_load_states(state, begin, channel, batch, width, states, PART, N),)
        if i + 1 < S // PART:
            following = _take(board, (i + 1) * PART, PART, BLOCK_D, N)
            # Else the compiler moves these loads behind what they are to run beside.
            tl.debug_barrier()
        decay = tl.exp2(step[:, :, None] * rate[None, :, :])
        h = tl.fma(decay, held[i].to(tl.float32), step_u[:, :, None] * B[:, None, :])
        at, in_part = _states_at(state, first + i * PART, channel, batch, width, states, PART, N)
        tl.store(at, h.to(state.dtype.element_ty), mask=in_part)
        sums = sums + (tl.sum(h * C[:, None, :], 2),)
    out = _rows(sums)
    if D is not None:
        out += u * skip[None, :]
    if z_q is not None:
        out *= silu(z.to(tl.float32) * z_s[None, :])
    tl.store(y + row * width + channel[None, :], out, mask=mask)


def run_steps(
    operands: tuple[Any, ...],
    state: Tensor,
    y: Tensor,
    sizes: tuple[int, int, int, int],
    strides: tuple[int, ...],
    softplus: bool,
    sequences: int,
    block_d: int,
    num_warps: int,
) -> None:
    """Fill y [batch, 1, width] and write over the states; sizes are batch, width, rank and states.

    `operands` and `strides` are those of the kernel. A program takes `block_d` channels of
    `sequences`, both powers of two and not below FEWEST; the rank is at most DEEPEST.
    """
    batch, width, rank, states = sizes
    columns = 32 * triton.cdiv(rank, 32)
    k = 1 << (columns.bit_length() - 1)
    n = triton.next_power_of_2(states)
    # A thread holds 8 states of a part.
    part = max(1, min(sequences, 256 * num_warps // (block_d * n)))
    grid = triton.cdiv(width, block_d), triton.cdiv(batch, sequences)
    boards = y.new_empty((grid[0] * grid[1], sequences, 2 * block_d + 2 * n))
    launch(
        _steps_kernel,
        grid,
        *(*operands, state, y, boards, *sizes, *strides),
        device=y.device,
        SOFTPLUS=softplus,
        S=sequences,
        PART=part,
        AHEAD=min(_AHEAD, sequences // part),
        K=k,
        MORE_K=0 if columns == k else triton.next_power_of_2(columns - k),
        N=n,
        BLOCK_D=block_d,
        num_warps=num_warps,
        maxnreg=96,  # five programs of four warps share a processor
    )
