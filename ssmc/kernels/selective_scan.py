"""The selective scan of a prompt on int8 operands: `int8_selective_scan` for any length.

On a Hopper GPU the kernel of `ssmc.kernels.selective_scan_warps` does it. The one here is for other
GPUs, Triton's interpreter and what that one does not take: a program holds the states of some
channels and goes along the length in tiles, of which only the chain h = fma(decay, h, step) is
sequential.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from ssmc.errors import UsageError
from ssmc.kernels import selective_scan_warps
from ssmc.kernels.arithmetic import LOG2E, parameter, silu, softplus
from ssmc.kernels.launch import await_inputs, can_chain, launch, let_next_load
from ssmc.kernels.tiles import processors

_TOKENS = 32  # positions a program makes B and C of
_FLAGS = 256  # set to zero at a time
MANY_CHANNELS, FEW_CHANNELS = 3072, 1280
"""From MANY on a lane holds four states, below FEW one: few channels are spread over more lanes."""


@triton.jit
def _compose(decay_1, h_1, decay_2, h_2):
    return decay_1 * decay_2, tl.fma(decay_2, h_1, h_2)


@triton.jit
def _later(h_1, h_2):
    return h_2


@triton.jit
def _recur(dt, dt_u, B, A, h):
    """The states [T, N, D] of a tile: dt, dt_u [T, D], B [T, N]; A times log2(e) and h [N, D]."""
    decay = tl.exp2(dt[:, None, :] * A[None, :, :])
    step = dt_u[:, None, :] * B[:, :, None]
    first = (tl.arange(0, dt.shape[0]) == 0)[:, None, None]
    step = tl.where(first, tl.fma(decay, h[None, :, :], step), step)
    _, states = tl.associative_scan((decay, step), 0, _compose)
    return states


@triton.jit
def _at(step, length, REVERSE: tl.constexpr):
    """Where in the sequence the scan is at its steps; int64, since rows of it may be far apart."""
    return (length - 1 - step if REVERSE else step).to(tl.int64)


@triton.jit
def _tokens_kernel(
    B_q,
    B_scale,
    C_q,
    C_scale,
    tokens,
    token_scales,
    flags,
    length,
    states,
    rows,
    blocks,
    B_batch,
    B_row,
    B_scale_batch,
    B_scale_row,
    C_batch,
    C_row,
    C_scale_batch,
    C_scale_row,
    REVERSE: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
    FLAGS: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """B and C in the order of the scan, zeros past the end; all channels use them.

    `tokens` int32 [batch, rows, N] are the integers as bfloat16, B in the high half and C in the
    low one; `token_scales` float32 [batch, rows, 2]. `flags` [blocks] are set to zero.
    """
    let_next_load(CHAIN)
    await_inputs(CHAIN)
    batch = tl.program_id(1).to(tl.int64)
    step = tl.program_id(0) * T + tl.arange(0, T)
    state = tl.arange(0, N)
    inside = step < length
    mask = inside[:, None] & (state < states)[None, :]
    at = _at(step, length, REVERSE)
    B = tl.load(B_q + batch * B_batch + at[:, None] * B_row + state[None, :], mask=mask, other=0)
    C = tl.load(C_q + batch * C_batch + at[:, None] * C_row + state[None, :], mask=mask, other=0)
    B_s = tl.load(B_scale + batch * B_scale_batch + at * B_scale_row, mask=inside, other=0.0)
    C_s = tl.load(C_scale + batch * C_scale_batch + at * C_scale_row, mask=inside, other=0.0)
    words = _bits(B) | (_bits(C) >> 16) & 0xFFFF
    row = batch * rows + step
    target = tokens + row[:, None] * N + state[None, :]
    tl.store(target, words, mask=(step < rows)[:, None])
    tl.store(token_scales + row * 2, B_s, mask=step < rows)
    tl.store(token_scales + row * 2 + 1, C_s, mask=step < rows)
    if tl.program_id(0) + tl.program_id(1) == 0:
        for first in range(0, blocks, FLAGS):
            flag = first + tl.arange(0, FLAGS)
            tl.store(flags + flag, 0, mask=flag < blocks)


@triton.jit
def _bits(q):
    """int8 as float32, of which the low half is zero, in its bits."""
    return q.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _load_tile(x, row, step, length, channel, width):
    """x[row, channel] as float32 where step < length and channel < width, else zero."""
    mask = (step < length)[:, None] & (channel < width)[None, :]
    return tl.load(x + row[:, None] + channel[None, :], mask=mask, other=0).to(tl.float32)


@triton.jit
def _scan_kernel(
    u_q,
    u_scale,
    dt_q,
    dt_scale,
    A,
    dt_bias,
    tokens,
    token_scales,
    D,
    z_q,
    z_scale,
    old_state,
    y,
    new_state,
    length,
    width,
    states,
    rows,
    u_scale_stride,
    dt_scale_stride,
    z_scale_stride,
    u_batch,
    u_row,
    dt_batch,
    dt_row,
    z_batch,
    z_row,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """BLOCK_D channels of one sequence, T positions at a time."""
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

    cell += batch * width * states
    if old_state is not None:
        h = tl.load(old_state + cell, mask=inside, other=0.0)
    else:
        h = tl.zeros((N, BLOCK_D), tl.float32)
    for first in range(0, length, T):
        step = first + tl.arange(0, T)
        at = _at(step, length, REVERSE)
        u = _load_tile(u_q + batch * u_batch, at * u_row, step, length, channel, width)
        u *= u_s[None, :]
        dt = _load_tile(dt_q + batch * dt_batch, at * dt_row, step, length, channel, width)
        dt = dt * dt_s[None, :] + bias[None, :]
        if SOFTPLUS:
            dt = softplus(dt)
        # A step of zero past the end leaves the state as it is.
        dt = tl.where((step < length)[:, None], dt, 0.0)
        row = batch * rows + step
        words = tl.load(tokens + row[:, None] * N + state[None, :])
        B = (words & -65536).to(tl.float32, bitcast=True)
        C = (words << 16).to(tl.float32, bitcast=True)
        dt_u = dt * u * tl.load(token_scales + row * 2)[:, None]
        states_at = _recur(dt, dt_u, B, decay_rate, h)
        h = tl.reduce(states_at, 0, _later)
        out = tl.sum(states_at * C[:, :, None], 1)
        out *= tl.load(token_scales + row * 2 + 1)[:, None]
        if D is not None:
            out = tl.fma(u, skip[None, :], out)
        if z_q is not None:
            z = _load_tile(z_q + batch * z_batch, at * z_row, step, length, channel, width)
            out = out * silu(z * z_s[None, :])
        target = y + (batch * length + at)[:, None] * width + channel[None, :]
        tl.store(target, out, mask=(step < length)[:, None] & (channel < width)[None, :])
    tl.store(new_state + cell, h, mask=inside)


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
    lanes: int | None = None,
    num_warps: int | None = None,
    block_d: int | None = None,
    block_t: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssmc.ops.int8.int8_selective_scan`; the state given is left alone.

    u_q, dt_q, z_q [B, L, D] may be views of wider rows. u_scale, dt_scale, z_scale are [] or [D],
    B_scale and C_scale [] or [B, L, 1]. Launch parameters are powers of two: `lanes` of a warp for
    a channel, `num_warps` a program (of the lanes, and as many besides), `block_t` positions at a
    time; `block_d` channels a program chooses the kernel without lanes.
    UsageError when z_q and z_scale do not come together.
    """
    if (z_q is None) != (z_scale is None):
        raise UsageError("ssmc::int8_selective_scan: z_q and z_scale come together or not at all")
    batch, length, width = u_q.shape
    states = A.shape[1]
    device = u_q.device
    u_q, dt_q, B_q, C_q = (_channels_adjoin(x) for x in (u_q, dt_q, B_q, C_q))
    z_q = None if z_q is None else _channels_adjoin(z_q)
    by_lanes = None
    if block_d is None and can_chain(device):
        by_lanes = selective_scan_warps.constants(
            states, lanes or _lanes(batch * width), num_warps or 4, block_t or 16
        )
    if by_lanes is None:
        tile = min(block_t or 16, triton.next_power_of_2(max(length, 1)))
        padded = triton.next_power_of_2(states)
        block_d = block_d or 8
    else:
        tile = by_lanes["T"]
        padded = by_lanes["LANES"] * by_lanes["SHARE"]
        block_d = 32 // by_lanes["LANES"] * by_lanes["num_warps"]
        u_q, dt_q = _copyable(u_q), _copyable(dt_q)
        z_q = None if z_q is None else _copyable(z_q)
    tiles, blocks = triton.cdiv(length, tile), triton.cdiv(width, block_d)

    B_scale, C_scale = (x.expand(batch, length, 1) for x in (B_scale, C_scale))
    A, state = A.contiguous(), None if state is None else state.contiguous()
    y = torch.empty((batch, length, width), dtype=torch.float32, device=device)
    new_state = torch.empty((batch, width, states), dtype=torch.float32, device=device)
    rows = tile * (tiles + selective_scan_warps.AHEAD.value)
    tokens = torch.empty((batch, rows, padded), dtype=torch.int32, device=device)
    token_scales = torch.empty((batch, rows, 2), dtype=torch.float32, device=device)
    flags = torch.empty(batch * blocks, dtype=torch.int32, device=device)
    launch(
        _tokens_kernel,
        (triton.cdiv(rows, _TOKENS), batch),
        *(B_q, B_scale, C_q, C_scale, tokens, token_scales, flags),
        *(length, states, rows, batch * blocks),
        *_strides(B_q, B_scale, C_q, C_scale),
        device=device,
        REVERSE=reverse,
        T=_TOKENS,
        N=padded,
        FLAGS=_FLAGS,
        num_warps=4,
    )
    strides = (
        *(u_scale.dim(), dt_scale.dim(), 0 if z_scale is None else z_scale.dim()),
        *_strides(u_q, dt_q),
        *((0, 0) if z_q is None else _strides(z_q)),
    )
    operands = (u_q, u_scale, dt_q, dt_scale, A, dt_bias, tokens, token_scales)
    rest = (D, z_q, z_scale, state, y, new_state, length, width, states, rows)
    if by_lanes is None:
        launch(
            _scan_kernel,
            (blocks, batch),
            *(*operands, *rest, *strides),
            device=device,
            SOFTPLUS=softplus,
            REVERSE=reverse,
            T=tile,
            N=padded,
            BLOCK_D=block_d,
            num_warps=num_warps or 1,
        )
    else:
        total = batch * blocks * tiles
        share = selective_scan_warps.share(batch * blocks, tiles, processors(device))
        launch(
            selective_scan_warps.scan_kernel,
            (triton.cdiv(total, share),),
            *(*operands, flags, *rest, blocks, tiles, total, share, *strides),
            device=device,
            SOFTPLUS=softplus,
            REVERSE=reverse,
            EVEN=width % block_d == 0,
            **by_lanes,
        )
    return y, new_state


def _lanes(channels: int) -> int:
    return 4 if channels >= MANY_CHANNELS else 8 if channels >= FEW_CHANNELS else 16


def _channels_adjoin(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _copyable(x: Tensor) -> Tensor:
    """x [B, L, C], or a copy with longer rows: they are to begin and end at multiples of 16."""
    whole = selective_scan_warps.COPIED_BYTES
    if all(n % whole == 0 for n in (x.shape[2], x.data_ptr(), *x.stride()[:2])):
        return x
    return functional.pad(x, (0, -x.shape[2] % whole)).contiguous()


def _strides(*operands: Tensor) -> tuple[int, ...]:
    """From sequence to sequence and from position to position, of each operand [B, L, C]."""
    return tuple(stride for x in operands for stride in x.stride()[:2])
