"""The selective scan of a prompt on int8 operands: `int8_selective_scan` for any length.

A program holds the states of some channels in registers and goes along the length in tiles. The 32
lanes of its one warp are the channels times a part of the N states; what belongs to one position
and channel (softplus, gate) is computed once, and only C . h crosses lanes. Of a tile's work only
the chain h = fma(decay, h, step) is sequential. The exponentials, L D N of them at 16 a clock in a
multiprocessor, are the floor.

Where the channels are too few to fill the GPU, the length is cut into chunks that run side by side:
one kernel finds what a chunk makes of a zero state, and the decay over it, exp(A sum dt); the next
one starts each chunk from the state that follows. All but the last chunk's states are computed
twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.errors import UsageError
from ssmc.kernels.arithmetic import LOG2E
from ssmc.kernels.launch import await_inputs, launch

_FLOAT_BITS = tl.constexpr(0x4B400000)  # of 1.5 * 2^23: there one unit in the last place is 1
_FLOAT_BASE = tl.constexpr(12582912.0)


@triton.jit
def float_of(q):
    """int8 as float32 by two additions: a conversion takes as long as an exponential."""
    return (q.to(tl.int32) + _FLOAT_BITS).to(tl.float32, bitcast=True) - _FLOAT_BASE


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log1p(t), t = exp(-|x|); relative error below 4e-7.

    log1p(t) / t for t in 0..1 is the polynomial of the least relative error: no division.
    """
    t = tl.exp2(tl.abs(x) * -LOG2E)
    p = tl.fma(t, -0.008539204, 0.044089616)
    p = tl.fma(t, p, -0.107681692)
    p = tl.fma(t, p, 0.177452400)
    p = tl.fma(t, p, -0.244954623)
    p = tl.fma(t, p, 0.332754797)
    p = tl.fma(t, p, -0.499974054)
    p = tl.fma(t, p, 0.999999806)
    return tl.fma(t, p, tl.maximum(x, 0.0))


@triton.jit
def silu(x):
    """x / (1 + exp(-x)) to a few units in the last place; the division is a squared rsqrt."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))
    return x * (root * root)


@triton.jit
def _compose(decay_1, h_1, decay_2, h_2):  # noqa: ANN202
    return decay_1 * decay_2, tl.fma(decay_2, h_1, h_2)


@triton.jit
def _later(h_1, h_2):  # noqa: ANN202
    return h_2


@triton.jit
def _recur(dt, dt_u, B, A, h):  # noqa: ANN202
    """The states [T, N, D] of a tile: dt, dt_u [T, D], B [T, N]; A times log2(e) and h [N, D]."""
    decay = tl.exp2(dt[:, None, :] * A[None, :, :])
    step = dt_u[:, None, :] * B[:, :, None]
    first = (tl.arange(0, dt.shape[0]) == 0)[:, None, None]
    step = tl.where(first, tl.fma(decay, h[None, :, :], step), step)
    _, states = tl.associative_scan((decay, step), 0, _compose)
    return states


@triton.jit
def _positions(step, length, REVERSE: tl.constexpr):  # noqa: ANN202
    """Where in the sequence the scan is at its steps; int64, since rows of it may be far apart."""
    return (length - 1 - step if REVERSE else step).to(tl.int64)


@triton.jit
def _load_tile(x, row, step, end, column, width):  # noqa: ANN202
    """x[row, column] of the tile's steps before `end` and columns before `width`, else zero."""
    mask = (step < end)[:, None] & (column < width)[None, :]
    return tl.load(x + row[:, None] + column[None, :], mask=mask, other=0)


@triton.jit
def _load_tokens(q, scale, row, scale_row, step, end, state, states):  # noqa: ANN202
    """B or C of a tile: (int8 [T, N], scale [T])."""
    values = _load_tile(q, row, step, end, state, states)
    return values, tl.load(scale + scale_row, mask=step < end, other=0.0)


@triton.jit
def _step_sizes(  # noqa: ANN202
    dt_q,
    scale,
    bias,
    step,
    end,
    SOFTPLUS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """dt of a tile [T, D]; zero past the end, which leaves a state as it is."""
    dt = float_of(dt_q) * scale[None, :] + bias[None, :]
    if SOFTPLUS:
        dt = softplus(dt)
    return dt if EVEN else tl.where((step < end)[:, None], dt, 0.0)


@triton.jit
def parameter(pointer, stride, channel, width):
    """A parameter a channel (stride 1) or of all (stride 0); zeros where there is none."""
    if pointer is not None:
        value = tl.load(pointer + channel * stride, mask=channel < width, other=1.0)
    else:
        value = tl.zeros(channel.shape, tl.float32)
    return value


@triton.jit
def _summary_kernel(  # noqa: ANN202
    u_q,
    u_scale,
    dt_q,
    dt_scale,
    A,
    dt_bias,
    B_q,
    B_scale,
    ends,
    totals,
    length,
    width,
    states,
    chunk,
    u_scale_stride,
    dt_scale_stride,
    u_batch,
    u_row,
    dt_batch,
    dt_row,
    B_batch,
    B_row,
    B_scale_batch,
    B_scale_row,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    EVEN: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """Per chunk: the state after it from zeros, `ends` [G, B, D, N], and sum dt `totals` [G, B, D].

    `chunk` is the chunk's length, a multiple of T. A tile's operands are loaded while the tile in
    front is worked on.
    """
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    batch = tl.program_id(1).to(tl.int64)
    state = tl.arange(0, N)
    inside = (channel < width)[None, :] & (state < states)[:, None]
    cell = channel[None, :] * states + state[:, None]
    decay_rate = tl.load(A + cell, mask=inside, other=0.0) * LOG2E
    u_s = parameter(u_scale, u_scale_stride, channel, width)
    dt_s = parameter(dt_scale, dt_scale_stride, channel, width)
    bias = parameter(dt_bias, 1, channel, width)
    await_inputs(CHAIN)

    u_q += batch * u_batch
    dt_q += batch * dt_batch
    B_q += batch * B_batch
    B_scale += batch * B_scale_batch
    start = tl.program_id(2) * chunk
    end = tl.minimum(start + chunk, length)
    h = tl.zeros((N, BLOCK_D), tl.float32)
    total = tl.zeros((T, BLOCK_D), tl.float32)
    step = start + tl.arange(0, T)
    at = _positions(step, length, REVERSE)
    u = _load_tile(u_q, at * u_row, step, end, channel, width)
    dt = _load_tile(dt_q, at * dt_row, step, end, channel, width)
    B, B_s = _load_tokens(B_q, B_scale, at * B_row, at * B_scale_row, step, end, state, states)
    for first in range(start, end, T):
        step = first + tl.arange(0, T)
        dt_t = _step_sizes(dt, dt_s, bias, step, end, SOFTPLUS, EVEN)
        dt_u = dt_t * (float_of(u) * u_s[None, :])
        B_t = float_of(B) * B_s[:, None]
        step += T
        at = _positions(step, length, REVERSE)
        u = _load_tile(u_q, at * u_row, step, end, channel, width)
        dt = _load_tile(dt_q, at * dt_row, step, end, channel, width)
        B, B_s = _load_tokens(B_q, B_scale, at * B_row, at * B_scale_row, step, end, state, states)
        total += dt_t
        h = tl.reduce(_recur(dt_t, dt_u, B_t, decay_rate, h), 0, _later)
    summary = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + batch
    tl.store(ends + summary * width * states + cell, h, mask=inside)
    tl.store(totals + summary * width + channel, tl.sum(total, 0), mask=channel < width)


@triton.jit
def _scan_kernel(  # noqa: ANN202, C901
    u_q,
    u_scale,
    dt_q,
    dt_scale,
    A,
    dt_bias,
    B_q,
    B_scale,
    C_q,
    C_scale,
    D,
    z_q,
    z_scale,
    old_state,
    ends,
    totals,
    y,
    new_state,
    length,
    width,
    states,
    chunk,
    u_scale_stride,
    dt_scale_stride,
    u_batch,
    u_row,
    dt_batch,
    dt_row,
    B_batch,
    B_row,
    B_scale_batch,
    B_scale_row,
    C_batch,
    C_row,
    C_scale_batch,
    C_scale_row,
    z_scale_stride,
    z_batch,
    z_row,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    EVEN: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """One chunk of some channels of one sequence, from the state that the chunks in front leave.

    `ends` and `totals` are those of `_summary_kernel`; the last chunk stores the new state. A
    tile's operands are loaded while the tile in front is worked on.
    """
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    batch = tl.program_id(1).to(tl.int64)
    state = tl.arange(0, N)
    inside = (channel < width)[None, :] & (state < states)[:, None]
    cell = channel[None, :] * states + state[:, None]
    decay_rate = tl.load(A + cell, mask=inside, other=0.0) * LOG2E
    u_s = parameter(u_scale, u_scale_stride, channel, width)
    dt_s = parameter(dt_scale, dt_scale_stride, channel, width)
    z_s = parameter(z_scale, z_scale_stride, channel, width)
    skip = parameter(D, 1, channel, width)
    bias = parameter(dt_bias, 1, channel, width)
    await_inputs(CHAIN)

    u_q += batch * u_batch
    dt_q += batch * dt_batch
    if z_q is not None:
        z_q += batch * z_batch
    B_q += batch * B_batch
    B_scale += batch * B_scale_batch
    C_q += batch * C_batch
    C_scale += batch * C_scale_batch
    y += batch * length * width
    start = tl.program_id(2) * chunk
    end = tl.minimum(start + chunk, length)
    step = start + tl.arange(0, T)
    at = _positions(step, length, REVERSE)
    u = _load_tile(u_q, at * u_row, step, end, channel, width)
    dt = _load_tile(dt_q, at * dt_row, step, end, channel, width)
    B, B_s = _load_tokens(B_q, B_scale, at * B_row, at * B_scale_row, step, end, state, states)
    C, C_s = _load_tokens(C_q, C_scale, at * C_row, at * C_scale_row, step, end, state, states)
    if z_q is not None:
        z = _load_tile(z_q, at * z_row, step, end, channel, width)

    if old_state is not None:
        h = tl.load(old_state + batch * width * states + cell, mask=inside, other=0.0)
    else:
        h = tl.zeros((N, BLOCK_D), tl.float32)
    summary = batch
    for _ in range(tl.program_id(2)):
        total = tl.load(totals + summary * width + channel, mask=channel < width, other=0.0)
        made = tl.load(ends + summary * width * states + cell, mask=inside, other=0.0)
        h = tl.fma(tl.exp2(total[None, :] * decay_rate), h, made)
        summary += tl.num_programs(1)

    for first in range(start, end, T):
        step = first + tl.arange(0, T)
        at = _positions(step, length, REVERSE)
        u_t = float_of(u) * u_s[None, :]
        dt_t = _step_sizes(dt, dt_s, bias, step, end, SOFTPLUS, EVEN)
        B_t = float_of(B) * B_s[:, None]
        C_t = float_of(C) * C_s[:, None]
        if z_q is not None:
            gate = silu(float_of(z) * z_s[None, :])
        ahead = step + T
        next_at = _positions(ahead, length, REVERSE)
        u = _load_tile(u_q, next_at * u_row, ahead, end, channel, width)
        dt = _load_tile(dt_q, next_at * dt_row, ahead, end, channel, width)
        B, B_s = _load_tokens(
            B_q, B_scale, next_at * B_row, next_at * B_scale_row, ahead, end, state, states
        )
        C, C_s = _load_tokens(
            C_q, C_scale, next_at * C_row, next_at * C_scale_row, ahead, end, state, states
        )
        if z_q is not None:
            z = _load_tile(z_q, next_at * z_row, ahead, end, channel, width)
        reached = _recur(dt_t, dt_t * u_t, B_t, decay_rate, h)
        h = tl.reduce(reached, 0, _later)
        out = tl.sum(reached * C_t[:, :, None], 1)
        if D is not None:
            out = tl.fma(u_t, skip[None, :], out)
        if z_q is not None:
            out = out * gate
        target = y + at[:, None] * width + channel[None, :]
        tl.store(target, out, mask=(step < end)[:, None] & (channel < width)[None, :])
    if tl.program_id(2) == tl.num_programs(2) - 1:
        tl.store(new_state + batch * width * states + cell, h, mask=inside)


def int8_selective_scan(
    u_q: Tensor,
    u_scale: Tensor,
    dt_q: Tensor,
    dt_scale: Tensor,
    A: Tensor,
    B_q: Tensor,
    B_scale: Tensor,
    C_q: Tensor,
    C_scale: Tensor,
    D: Tensor | None = None,
    z_q: Tensor | None = None,
    z_scale: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state: Tensor | None = None,
    softplus: bool = True,
    reverse: bool = False,
    *,
    block_d: int | None = None,
    block_t: int | None = None,
    chunks: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssmc.ops.int8.int8_selective_scan`; the state given is left alone.

    u_q, dt_q, z_q [B, L, D] may be views of wider rows. u_scale, dt_scale, z_scale are [] or [D],
    B_scale and C_scale [] or [B, L, 1]. `block_d` channels a program (powers of two: 32 lanes are
    block_d channels by 32 / block_d states), `block_t` positions a tile, the length in `chunks`.
    UsageError when z_q and z_scale do not come together.
    """
    if (z_q is None) != (z_scale is None):
        raise UsageError("ssmc::int8_selective_scan: z_q and z_scale come together or not at all")
    batch, length, width = u_q.shape
    states = A.shape[1]
    block_d = block_d or 8
    tile = min(block_t or 16, triton.next_power_of_2(max(length, 1)))
    count = chunks or _chunks(batch * triton.cdiv(width, block_d), length)
    chunk = tile * max(1, triton.cdiv(length, tile * count))
    count = max(1, triton.cdiv(length, chunk))

    device = u_q.device
    y = torch.empty(u_q.shape, dtype=torch.float32, device=device)
    new_state = torch.empty((batch, width, states), dtype=torch.float32, device=device)
    ends = torch.empty((count - 1, *new_state.shape), dtype=torch.float32, device=device)
    totals = torch.empty((count - 1, batch, width), dtype=torch.float32, device=device)
    u_q, dt_q, B_q, C_q = (_channels_adjoin(x) for x in (u_q, dt_q, B_q, C_q))
    z_q = None if z_q is None else _channels_adjoin(z_q)
    B_scale, C_scale = (x.expand(batch, length, 1) for x in (B_scale, C_scale))
    A, state = A.contiguous(), None if state is None else state.contiguous()
    meta = {
        "SOFTPLUS": softplus,
        "REVERSE": reverse,
        "EVEN": length % tile == 0,
        "T": tile,
        "N": triton.next_power_of_2(states),
        "BLOCK_D": block_d,
        "num_warps": 1,
    }
    blocks = triton.cdiv(width, block_d)
    shared = (u_q, u_scale, dt_q, dt_scale, A, dt_bias, B_q, B_scale)
    sizes = (length, width, states, chunk, u_scale.dim(), dt_scale.dim())
    strides = _strides(u_q, dt_q, B_q, B_scale)
    launch(
        _summary_kernel,
        (blocks, batch, count - 1),
        *(*shared, ends, totals, *sizes, *strides),
        device=device,
        **meta,
    )
    z_strides = (0, 0, 0) if z_q is None or z_scale is None else (z_scale.dim(), *_strides(z_q))
    launch(
        _scan_kernel,
        (blocks, batch, count),
        *(*shared, C_q, C_scale, D, z_q, z_scale, state, ends, totals, y, new_state),
        *(*sizes, *strides, *_strides(C_q, C_scale), *z_strides),
        device=device,
        **meta,
    )
    return y, new_state


def _channels_adjoin(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*operands: Tensor) -> tuple[int, ...]:
    """From sequence to sequence and from position to position, of each operand [B, L, C]."""
    return tuple(stride for x in operands for stride in x.stride()[:2])


def _chunks(programs: int, length: int) -> int:
    """How many chunks give every scheduler of a large GPU a warp; each at least 128 positions."""
    return max(1, min(512 // programs, length // 128))
