"""The selective scan of a prompt laid out by lanes, in Gluon: a warp takes a few channels.

A channel has LANES neighbouring lanes of a warp, each with its share of the states, which stay in
registers for the whole length. The length goes by in groups of LANES positions. In a group each
lane owns one position of its channel: it loads the position's bytes, computes step size and gate,
hands what the states need to the channel's other lanes, gets the sum over all states back and
stores y. So what belongs to one position and channel is computed once, lanes exchange by shuffles,
and no warp waits for another.

B and C are the same for all channels: a small kernel in front makes them float32, in the order of
the scan and the B and C of a state side by side, so that a lane loads its share as one vector.

Loads are a group ahead. Step sizes and gates of the next group are computed between the states of
this one, which hides how long the operations of the one chain take.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ssmc.kernels.arithmetic import LOG2E
from ssmc.kernels.launch import await_inputs
from ssmc.kernels.scan_arithmetic import float_of, parameter, scaled, silu, softplus


@triton.jit
def tokens_kernel(
    B_q,
    B_scale,
    C_q,
    C_scale,
    tokens,
    length,
    states,
    rows,
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
    CHAIN: tl.constexpr,
):
    """`tokens` float32 [batch, rows, N, 2]: B and C in the order of the scan, zeros past the end."""
    await_inputs(CHAIN)
    batch = tl.program_id(1).to(tl.int64)
    step = tl.program_id(0) * T + tl.arange(0, T)
    state = tl.arange(0, N)
    inside = step < length
    mask = inside[:, None] & (state < states)[None, :]
    at = (length - 1 - step if REVERSE else step).to(tl.int64)
    B = tl.load(B_q + batch * B_batch + at[:, None] * B_row + state[None, :], mask=mask, other=0)
    C = tl.load(C_q + batch * C_batch + at[:, None] * C_row + state[None, :], mask=mask, other=0)
    B_s = tl.load(B_scale + batch * B_scale_batch + at * B_scale_row, mask=inside, other=0.0)
    C_s = tl.load(C_scale + batch * C_scale_batch + at * C_scale_row, mask=inside, other=0.0)
    pairs = tl.join(float_of(B) * B_s[:, None], float_of(C) * C_s[:, None])
    column = tl.arange(0, 2 * N)
    target = tokens + (batch * rows + step)[:, None] * (2 * N) + column[None, :]
    tl.store(target, tl.reshape(pairs, (T, 2 * N)), mask=(step < rows)[:, None])


@gluon.jit
def _from_lane(x, lane, LANES: gl.constexpr):  # noqa: ANN202
    """x of the channel's lane `lane`, in all of the channel's lanes."""
    segment: gl.constexpr = ((32 - LANES) << 8) | 31
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, $3, 0xffffffff;",
        "=f,f,r,r",
        [x, lane, segment],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _from_partner(x, distance):  # noqa: ANN202
    """x of the lane whose number differs in the bit `distance`."""
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;",
        "=f,f,r",
        [x, distance],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _exchange(parts, lane, HALF: gl.constexpr):  # noqa: ANN202
    """Of 2 HALF positions keep those on the lane's own side, with the partner's share added."""
    upper = (lane & HALF) != 0
    kept = ()
    for t in gl.static_range(HALF):
        own = gl.where(upper, parts[t + HALF], parts[t])
        other = gl.where(upper, parts[t], parts[t + HALF])
        kept = kept + (own + _from_partner(other, HALF),)
    return kept


@gluon.jit
def _to_owners(parts, lane, LEVELS: gl.constexpr):  # noqa: ANN202
    """The sum of parts[t] over a channel's lanes, in its lane t."""
    for level in gl.static_range(LEVELS):
        parts = _exchange(parts, lane, 1 << (LEVELS - 1 - level))
    return parts[0]


@gluon.jit
def _halves(x, COUNT: gl.constexpr):  # noqa: ANN202
    """Each of COUNT tensors [lanes, columns] as two of half the columns."""
    halves = ()
    for i in gl.static_range(COUNT):
        part = x[i]
        pairs = part.reshape((part.shape[0], 2, part.shape[1] // 2)).permute((0, 2, 1))
        low, high = gl.split(pairs)
        halves = halves + (low, high)
    return halves


@gluon.jit
def _columns(x, LEVELS: gl.constexpr, LAYOUT: gl.constexpr):  # noqa: ANN202
    """The 2^LEVELS columns of x [lanes, columns], each [lanes, 1] in LAYOUT; no data moves."""
    parts = (x,)
    for level in gl.static_range(LEVELS):
        parts = _halves(parts, 1 << level)
    columns = ()
    for i in gl.static_range(1 << LEVELS):
        column = gl.convert_layout(parts[i].reshape((x.shape[0],)), gl.SliceLayout(1, LAYOUT))
        columns = columns + (column[:, None],)
    return columns


@gluon.jit
def _load_group(u, dt, z, there):  # noqa: ANN202
    """The bytes of each lane's position; undefined where it is not `there`."""
    u_q = gl.load(u, mask=there)
    dt_q = gl.load(dt, mask=there)
    z_q = u_q if z is None else gl.load(z, mask=there)
    return u_q, dt_q, z_q


@gluon.jit
def _own(  # noqa: ANN202
    u_q, u_s, dt_q, dt_s, bias, z_q, z_s, there, SOFTPLUS: gl.constexpr, EVEN: gl.constexpr
):  # fmt: skip
    """(u, dt, dt u, gate) of each lane's position; a step of zero leaves a state as it is."""
    u = scaled(u_q, u_s)
    dt = scaled(dt_q, dt_s) + bias
    if SOFTPLUS:
        dt = softplus(dt)
    if not EVEN:
        dt = gl.where(there, dt, 0.0)
    return u, dt, dt * u, silu(scaled(z_q, z_s))


@gluon.jit
def scan_kernel(  # noqa: C901
    u_q, u_scale, dt_q, dt_scale, A, dt_bias, tokens, D, z_q, z_scale, old_state, y, new_state,
    length, width, states, rows, u_scale_stride, dt_scale_stride, z_scale_stride,
    u_batch, u_row, dt_batch, dt_row, z_batch, z_row,
    SOFTPLUS: gl.constexpr,
    REVERSE: gl.constexpr,
    EVEN: gl.constexpr,
    LANES: gl.constexpr,
    SHARE: gl.constexpr,
    num_warps: gl.constexpr,
    CHAIN: gl.constexpr,
):  # fmt: skip
    """Some channels of one sequence; `tokens` is what `tokens_kernel` made, a group past the end.

    Tensors are [LANES, channels], one element a lane, except for the vectors of B and C.
    """
    LEVELS: gl.constexpr = LANES.bit_length() - 1
    CHANNELS: gl.constexpr = 32 // LANES
    VECTOR: gl.constexpr = 2 * SHARE
    ROW: gl.constexpr = VECTOR * LANES
    OWN: gl.constexpr = gl.BlockedLayout([1, 1], [LANES, CHANNELS], [1, num_warps], [0, 1])
    VECTORS: gl.constexpr = gl.SliceLayout(
        2, gl.BlockedLayout([1, VECTOR, 1], [LANES, 1, CHANNELS], [1, 1, num_warps], [1, 0, 2])
    )
    lane = gl.arange(0, LANES, gl.SliceLayout(1, OWN))[:, None]
    channel = gl.arange(0, CHANNELS * num_warps, gl.SliceLayout(0, OWN))[None, :]
    lane, channel = gl.broadcast(lane, channel + gl.program_id(0) * CHANNELS * num_warps)
    kept = channel < width
    batch = gl.program_id(1).to(gl.int64)

    rates = ()
    for i in gl.static_range(SHARE):
        state = lane * SHARE + i
        rate = gl.load(A + channel * states + state, mask=kept & (state < states), other=0.0)
        rates = rates + (rate * LOG2E,)
    u_s = parameter(u_scale, u_scale_stride, channel, width)
    dt_s = parameter(dt_scale, dt_scale_stride, channel, width)
    z_s = parameter(z_scale, z_scale_stride, channel, width)
    skip = parameter(D, 1, channel, width)
    bias = parameter(dt_bias, 1, channel, width)
    await_inputs(CHAIN)

    cell = (batch * width + channel) * states
    h = ()
    for i in gl.static_range(SHARE):
        if old_state is None:
            h = h + (rates[i] * 0.0,)
        else:
            state = lane * SHARE + i
            h = h + (gl.load(old_state + cell + state, mask=kept & (state < states), other=0.0),)

    start = gl.where(REVERSE, length - 1, 0).to(gl.int64)
    sign: gl.constexpr = -1 if REVERSE else 1
    at = start + sign * lane
    column = gl.minimum(channel, width - 1)
    u_q += batch * u_batch + at * u_row + column
    dt_q += batch * dt_batch + at * dt_row + column
    if z_q is not None:
        z_q += batch * z_batch + at * z_row + column
    y += (batch * length + at) * width + channel
    group: gl.constexpr = sign * LANES
    vector = gl.arange(0, LANES, gl.SliceLayout(1, VECTORS))[:, None] * VECTOR
    vector += gl.arange(0, VECTOR, gl.SliceLayout(0, VECTORS))[None, :]
    tokens += batch * rows * ROW + vector

    pairs = ()
    for t in gl.static_range(LANES):
        pairs = pairs + (gl.load(tokens + t * ROW),)
    step = lane
    there = step < length
    u_b, dt_b, z_b = _load_group(u_q, dt_q, z_q, there)
    u, dt, dt_u, gate = _own(u_b, u_s, dt_b, dt_s, bias, z_b, z_s, there, SOFTPLUS, EVEN)
    u_q += group * u_row
    dt_q += group * dt_row
    if z_q is not None:
        z_q += group * z_row
    next_there = step + LANES < length
    u_b, dt_b, z_b = _load_group(u_q, dt_q, z_q, next_there)
    for first in range(0, length, LANES):
        next_u, next_dt, next_dt_u, next_gate = _own(
            u_b, u_s, dt_b, dt_s, bias, z_b, z_s, next_there, SOFTPLUS, EVEN
        )
        u_q += group * u_row
        dt_q += group * dt_row
        if z_q is not None:
            z_q += group * z_row
        after = (first + 2 * LANES if EVEN else step + 2 * LANES) < length
        u_b, dt_b, z_b = _load_group(u_q, dt_q, z_q, after)
        tokens += LANES * ROW
        parts = ()
        next_pairs = ()
        for t in gl.static_range(LANES):
            columns = _columns(pairs[t], VECTOR.bit_length() - 1, OWN)
            next_pairs = next_pairs + (gl.load(tokens + t * ROW),)
            dt_t = _from_lane(dt, t, LANES)
            dt_u_t = _from_lane(dt_u, t, LANES)
            reached = ()
            part = dt_t
            for i in gl.static_range(SHARE):
                decay = gl.exp2(dt_t * rates[i])
                hidden = gl.fma(decay, h[i], dt_u_t * columns[2 * i])
                if i == 0:
                    part = hidden * columns[1]
                else:
                    part = gl.fma(hidden, columns[2 * i + 1], part)
                reached = reached + (hidden,)
            h = reached
            parts = parts + (part,)
        pairs = next_pairs
        out = _to_owners(parts, lane, LEVELS)
        if D is not None:
            out = gl.fma(u, skip, out)
        if z_q is not None:
            out = out * gate
        gl.store(y, out, mask=kept if EVEN else kept & there)
        y += group * width
        step += LANES
        there = next_there
        next_there = step + LANES < length
        u, dt, dt_u, gate = next_u, next_dt, next_dt_u, next_gate
    for i in gl.static_range(SHARE):
        state = lane * SHARE + i
        gl.store(new_state + cell + state, h[i], mask=kept & (state < states))
