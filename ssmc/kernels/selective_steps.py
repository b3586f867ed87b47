"""`selective_scan_step` of many sequences: dt_proj by the tensor cores, then the states in turn."""

# A tuple of pieces grows in a loop that Triton unrolls; it knows no starred expressions.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

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

DEEPEST = 1024  # columns of dt_proj: so far every sum is a float32
_AHEAD = 2  # parts of the states that are on their way while one is advanced


@triton.jit
def _load_weight(w, channel, start, width, rank, K: tl.constexpr):  # noqa: ANN202
    """Columns start .. start + K of some rows of the weight [width, rank]."""
    k = start + tl.arange(0, K)
    mask = (channel < width)[:, None] & (k < rank)[None, :]
    return tl.load(w + channel.to(tl.int64)[:, None] * rank + k[None, :], mask=mask, other=0)


@triton.jit
def _load_low(x, there, start, rank, K: tl.constexpr):  # noqa: ANN202
    """Columns start .. start + K of the low-rank dt of the rows x, and the largest of each row."""
    k = start + tl.arange(0, K)
    low = tl.load(x + k[None, :], mask=there[:, None] & (k < rank)[None, :], other=0.0)
    return low, tl.max(tl.abs(low), 1)


@triton.jit
def _tokens(x, there, states, N: tl.constexpr):  # noqa: ANN202
    """B and C [S, 2, N] of the rows x, each quantised with a scale of its own and dequantised."""
    n = tl.arange(0, N)
    at = x[:, :, None] + (tl.arange(0, 2)[:, None] * states + n[None, :])[None, :, :]
    values = tl.load(at, mask=there[:, None, None] & (n < states)[None, None, :], other=0.0)
    scale = scale_for(tl.max(tl.abs(values), 2))[:, :, None]
    return to_float(to_int8_within(values, inverse_of(scale))) * scale


@triton.jit
def _states_at(  # noqa: ANN202
    state, first, channel, batch, width, states, PART: tl.constexpr, N: tl.constexpr
):
    """Where the states [PART, channels, N] of sequences first .. first + PART are, and a mask."""
    sequence = first + tl.arange(0, PART)
    n = tl.arange(0, N)
    inside = (channel < width)[:, None] & (n < states)[None, :]
    cell = channel[:, None] * states + n[None, :]
    at = state + sequence.to(tl.int64)[:, None, None] * (width * states) + cell[None, :, :]
    return at, (sequence < batch)[:, None, None] & inside[None, :, :]


@triton.jit
def _load_states(  # noqa: ANN202
    state, first, channel, batch, width, states, PART: tl.constexpr, N: tl.constexpr
):
    at, mask = _states_at(state, first, channel, batch, width, states, PART, N)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _joined(x, COUNT: tl.constexpr):  # noqa: ANN202
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
def _steps_kernel(  # noqa: ANN202, C901
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
    workspace,
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
    """BLOCK_D channels of S sequences, PART sequences at a time.

    Threads that advance a state need its step size, B and C, which are computed once and handed
    over in memory: `workspace` is float32 [programs, S, 2 BLOCK_D + 2 N]. The rank is taken as K
    and MORE_K columns. The weight and all that belongs to a channel are read before the inputs are
    waited for, and the states, which may not be read so early, are brought into the L2 cache.
    """
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, N)
    channel = tl.program_id(0) * BLOCK_D + d
    first = tl.program_id(1) * S
    sequence = first + tl.arange(0, S)
    kept = channel < width
    row = tl.minimum(sequence, batch - 1).to(tl.int64)[:, None]
    if CHAIN:
        SECTOR: tl.constexpr = 256 // state.dtype.element_ty.primitive_bitwidth  # 32 bytes
        own = state + (row * width + tl.minimum(channel, width - 1)[None, :]) * states
        for i in tl.static_range(0, N, SECTOR):
            prefetch(own + tl.minimum(i, states - 1))
    w = _load_weight(dt_w_q, channel, 0, width, rank, K)
    if MORE_K > 0:
        w_more = _load_weight(dt_w_q, channel, K, width, rank, MORE_K)
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
    there = sequence < batch
    mask = there[:, None] & kept[None, :]
    u = tl.load(u_q + row * u_row + channel[None, :], mask=mask, other=0).to(tl.float32)
    u *= u_s[None, :]
    x = x_proj + row * x_row
    low, largest = _load_low(x, there, 0, rank, K)
    if MORE_K > 0:
        low_more, largest_more = _load_low(x, there, K, rank, MORE_K)
        largest = tl.maximum(largest, largest_more)
    tokens = _tokens(x + rank, there, states, N)
    low_s = scale_for(largest)[:, None]
    inverse = inverse_of(low_s)
    total = tl.dot(to_int8_within(low, inverse), tl.trans(w), out_dtype=tl.int32)
    if MORE_K > 0:
        low_q = to_int8_within(low_more, inverse)
        total = tl.dot(low_q, tl.trans(w_more), total, out_dtype=tl.int32)
    dt = total.to(tl.float32) * (low_s * w_scale[None, :])
    if dt_proj_bias is not None:
        dt += proj_bias[None, :]
    dt = to_float(to_int8(dt, inverse_of(dt_s)[None, :])) * dt_s[None, :] + bias[None, :]
    if SOFTPLUS:
        dt = softplus(dt)

    LINE: tl.constexpr = 2 * BLOCK_D + 2 * N
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    shared = workspace + program * (S * LINE)
    line = tl.arange(0, S)[:, None] * LINE
    tl.store(shared + line + d[None, :], dt)
    tl.store(shared + line + BLOCK_D + d[None, :], dt * u)
    pair = 2 * BLOCK_D + tl.arange(0, 2 * N)
    tl.store(shared + line + pair[None, :], tl.reshape(tokens, (S, 2 * N)))
    tl.debug_barrier()

    rate *= LOG2E
    sums = ()
    for i in tl.static_range(0, S, PART):
        if i + AHEAD * PART < S:
            begin = first + i + AHEAD * PART
            held = held + (_load_states(state, begin, channel, batch, width, states, PART, N),)
        line = shared + (i + tl.arange(0, PART))[:, None] * LINE
        step = tl.load(line + d[None, :])
        step_u = tl.load(line + BLOCK_D + d[None, :])
        B = tl.load(line + 2 * BLOCK_D + n[None, :])
        C = tl.load(line + 2 * BLOCK_D + N + n[None, :])
        decay = tl.exp2(step[:, :, None] * rate[None, :, :])
        h = tl.fma(decay, held[i // PART].to(tl.float32), step_u[:, :, None] * B[:, None, :])
        at, in_part = _states_at(state, first + i, channel, batch, width, states, PART, N)
        tl.store(at, h.to(state.dtype.element_ty), mask=in_part)
        sums = sums + (tl.sum(h * C[:, None, :], 2),)
    out = tl.reshape(_joined(sums, S // PART), (PART, BLOCK_D, S // PART))
    out = tl.reshape(tl.permute(out, (2, 0, 1)), (S, BLOCK_D))
    if D is not None:
        out += u * skip[None, :]
    if z_q is not None:
        z = tl.load(z_q + row * z_row + channel[None, :], mask=mask, other=0).to(tl.float32)
        out *= silu(z * z_s[None, :])
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
    """Fill y [batch, width] and overwrite the states; `sizes` are batch, width, rank and states.

    The operands and strides are those of the kernel. `sequences` and `block_d` are at least 16.
    """
    batch, width, rank, states = sizes
    columns = 32 * triton.cdiv(rank, 32)
    k = 1 << (columns.bit_length() - 1)
    n = triton.next_power_of_2(states)
    # A thread holds 8 states at a time, of one channel where these are 16.
    part = max(1, min(sequences, 256 * num_warps // (block_d * n)))
    grid = triton.cdiv(width, block_d), triton.cdiv(batch, sequences)
    workspace = y.new_empty((grid[0] * grid[1], sequences, 2 * block_d + 2 * n))
    launch(
        _steps_kernel,
        grid,
        *(*operands, state, y, workspace, *sizes, *strides),
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
        maxnreg=96,  # five programs a multiprocessor, so that 640 run at a time
    )
