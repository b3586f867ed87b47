"""The selective scan of a prompt laid out by lanes, in Gluon: a warp takes a few channels.

A channel has LANES neighbouring lanes of a warp, each with its share of the states, which stay in
registers for the whole length. The length goes by in groups of LANES positions. In a group each
lane owns one position of its channel: it loads the position's bytes, computes step size and gate,
hands what the states need to the channel's other lanes through shared memory, gets the sum over all
states back by shuffles and stores y. So what belongs to one position and channel is computed once.

Loads are a group ahead. Step sizes and gates of the next group are computed between the states of
this one, which hides how long the operations of the one chain take.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ssmc.kernels.arithmetic import LOG2E, parameter, scaled, silu, softplus
from ssmc.kernels.launch import await_inputs


def constants(states: int, lanes: int, num_warps: int) -> dict[str, Any] | None:
    """The kernel's constants; None where a lane would get more than four states to hold."""
    padded = triton.next_power_of_2(states)
    lanes = max(lanes, padded // 4)
    if lanes > 32:
        return None
    return {"LANES": lanes, "SHARE": max(1, padded // lanes), "num_warps": num_warps}


@gluon.jit
def _append(items, item):  # noqa: ANN202
    return items + (item,)  # noqa: RUF005 (Triton knows no star)


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
        kept = _append(kept, own + _from_partner(other, HALF))
    return kept


@gluon.jit
def _to_owners(parts, lane, LEVELS: gl.constexpr):  # noqa: ANN202
    """The sum of parts[t] over a channel's lanes, in its lane t."""
    for level in gl.static_range(LEVELS):
        parts = _exchange(parts, lane, 1 << (LEVELS - 1 - level))
    return parts[0]


@gluon.jit
def _halves(x, COUNT: gl.constexpr):  # noqa: ANN202
    """Each of COUNT tensors [rows, columns] as two of half the columns."""
    halves = ()
    for i in gl.static_range(COUNT):
        part = x[i]
        pairs = part.reshape((part.shape[0], 2, part.shape[1] // 2)).permute((0, 2, 1))
        low, high = gl.split(pairs)
        halves = _append(_append(halves, low), high)
    return halves


@gluon.jit
def _columns(x, LAYOUT: gl.constexpr):  # noqa: ANN202
    """The columns of x [rows, columns], each [rows] in LAYOUT; no data moves."""
    LEVELS: gl.constexpr = x.shape[1].bit_length() - 1
    parts = (x,)
    for level in gl.static_range(LEVELS):
        parts = _halves(parts, 1 << level)
    columns = ()
    for i in gl.static_range(1 << LEVELS):
        columns = _append(columns, gl.convert_layout(parts[i].reshape((x.shape[0],)), LAYOUT))
    return columns


@gluon.jit
def _to_all(board, dt, dt_u, num_warps: gl.constexpr):  # noqa: ANN202
    """(dt, dt_u) of each position as [1, channels], by way of shared memory.

    One program's warps wait for each other here.
    """
    LANES: gl.constexpr = dt.shape[0]
    CHANNELS: gl.constexpr = 32 // LANES
    pair: gl.constexpr = gl.BlockedLayout(
        [1, 1, 2], [LANES, CHANNELS, 1], [1, num_warps, 1], [2, 0, 1]
    )
    all_lanes: gl.constexpr = gl.BlockedLayout(
        [1, 1, LANES, 2], [LANES, CHANNELS, 1, 1], [1, num_warps, 1, 1], [3, 2, 0, 1]
    )
    board.store(gl.convert_layout(gl.join(dt, dt_u), pair))
    read = board.permute((1, 0, 2)).load(gl.SliceLayout(0, all_lanes))
    all_dt, all_dt_u = gl.split(read)
    channels: gl.constexpr = gl.SliceLayout(0, dt.type.layout)
    dts = ()
    dt_us = ()
    columns = _columns(all_dt, channels)
    for t in gl.static_range(LANES):
        dts = _append(dts, columns[t][None, :])
    columns = _columns(all_dt_u, channels)
    for t in gl.static_range(LANES):
        dt_us = _append(dt_us, columns[t][None, :])
    return dts, dt_us


@gluon.jit
def _load_bytes(pointers, there):  # noqa: ANN202
    """u, dt and, where there is a gate, z of each lane's position; all exist if `there` is None."""
    loaded = ()
    for i in gl.static_range(len(pointers)):
        if there is None:
            loaded = _append(loaded, gl.load(pointers[i]))
        else:
            loaded = _append(loaded, gl.load(pointers[i], mask=there, other=0))
    return loaded


@gluon.jit
def _moved(pointers, distances):  # noqa: ANN202
    moved = ()
    for i in gl.static_range(len(pointers)):
        moved = _append(moved, pointers[i] + distances[i])
    return moved


@gluon.jit
def _own(loaded, scales, bias, there, SOFTPLUS: gl.constexpr):  # noqa: ANN202
    """(dt, dt u, u, gate) of each lane's position; a step of zero leaves a state as it is."""
    u = scaled(loaded[0], scales[0])
    dt = scaled(loaded[1], scales[1]) + bias
    if SOFTPLUS:
        dt = softplus(dt)
    if there is not None:
        dt = gl.where(there, dt, 0.0)
    gate = u
    if len(loaded) == 3:
        gate = silu(scaled(loaded[2], scales[2]))
    return dt, dt * u, u, gate


@gluon.jit
def _load_tokens(tokens, LANES: gl.constexpr, ROW: gl.constexpr):  # noqa: ANN202
    """The lanes' shares of B and C at each position of a group."""
    loaded = ()
    for t in gl.static_range(LANES):
        loaded = _append(loaded, gl.load(tokens + t * ROW))
    return loaded


@gluon.jit
def scan_kernel(  # noqa: C901
    u_q, u_scale, dt_q, dt_scale, A, dt_bias, tokens, D, z_q, z_scale, old_state, y,
    new_state, length, width, states, rows, u_scale_stride, dt_scale_stride, z_scale_stride,
    u_batch, u_row, dt_batch, dt_row, z_batch, z_row,
    SOFTPLUS: gl.constexpr,
    REVERSE: gl.constexpr,
    LANES: gl.constexpr,
    SHARE: gl.constexpr,
    num_warps: gl.constexpr,
    CHAIN: gl.constexpr,
):  # fmt: skip
    """Some channels of one sequence, 32 / LANES a warp.

    `tokens` float32 [batch, rows, N, 2], N = LANES SHARE, are B and C in the order of the scan and
    go on for a group past the end. Tensors are [LANES, channels], one element a lane, except for
    the vectors of B and C.
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
    start = gl.program_id(0) * (CHANNELS * num_warps)
    lane, channel = gl.broadcast(lane, channel + start)
    kept = channel < width
    batch = gl.program_id(1).to(gl.int64)

    rates = ()
    for i in gl.static_range(SHARE):
        state = lane * SHARE + i
        rate = gl.load(A + channel * states + state, mask=kept & (state < states), other=0.0)
        rates = _append(rates, rate * LOG2E)
    scales = (
        parameter(u_scale, u_scale_stride, channel, width),
        parameter(dt_scale, dt_scale_stride, channel, width),
        parameter(z_scale, z_scale_stride, channel, width),
    )
    skip = parameter(D, 1, channel, width)
    bias = parameter(dt_bias, 1, channel, width)
    await_inputs(CHAIN)

    cell = (batch * width + channel) * states
    h = ()
    for i in gl.static_range(SHARE):
        if old_state is None:
            h = _append(h, rates[i] * 0.0)
        else:
            state = lane * SHARE + i
            h = _append(
                h, gl.load(old_state + cell + state, mask=kept & (state < states), other=0.0)
            )

    sign: gl.constexpr = -1 if REVERSE else 1
    group: gl.constexpr = sign * LANES
    at = ((length - 1 if REVERSE else 0) + sign * lane).to(gl.int64)
    y += (batch * length + at) * width + channel
    y_move = (group * width).to(gl.int64)
    column = gl.minimum(channel, width - 1)
    pointers = (u_q + (batch * u_batch + at * u_row + column),)
    pointers = _append(pointers, dt_q + (batch * dt_batch + at * dt_row + column))
    moves = ((group * u_row).to(gl.int64), (group * dt_row).to(gl.int64))
    if z_q is not None:
        pointers = _append(pointers, z_q + (batch * z_batch + at * z_row + column))
        moves = _append(moves, (group * z_row).to(gl.int64))
    vector = gl.arange(0, LANES, gl.SliceLayout(1, VECTORS))[:, None] * VECTOR
    vector += gl.arange(0, VECTOR, gl.SliceLayout(0, VECTORS))[None, :]
    tokens += batch * rows * ROW + vector

    board = gl.allocate_shared_memory(
        gl.float32,
        [LANES, CHANNELS * num_warps, 2],
        gl.SwizzledSharedLayout(1, 1, 1, [2, 0, 1]),
    )
    here = _load_tokens(tokens, LANES, ROW)
    own = _own(_load_bytes(pointers, lane < length), scales, bias, lane < length, SOFTPLUS)
    pointers = _moved(pointers, moves)
    loaded = _load_bytes(pointers, lane + LANES < length)
    # As long as all positions of the group after the next exist nothing is masked.
    whole = gl.maximum(length // LANES - 2, 0) * LANES
    for MASKED in gl.static_range(2):
        for first in range(whole if MASKED else 0, length if MASKED else whole, LANES):
            step = first + lane
            there = step + LANES < length if MASKED else None
            next_own = _own(loaded, scales, bias, there, SOFTPLUS)
            pointers = _moved(pointers, moves)
            there = step + 2 * LANES < length if MASKED else None
            loaded = _load_bytes(pointers, there)
            tokens += LANES * ROW
            ahead = ()
            parts = ()
            dts, dt_us = _to_all(board, own[0], own[1], num_warps)
            for t in gl.static_range(LANES):
                columns = _columns(here[t], gl.SliceLayout(1, OWN))
                reached = ()
                part = dts[t]
                for i in gl.static_range(SHARE):
                    decay = gl.exp2(dts[t] * rates[i])
                    reached = _append(
                        reached, gl.fma(decay, h[i], dt_us[t] * columns[2 * i][:, None])
                    )
                    if i == 0:
                        part = reached[i] * columns[1][:, None]
                    else:
                        part = gl.fma(reached[i], columns[2 * i + 1][:, None], part)
                h = reached
                ahead = _append(ahead, gl.load(tokens + t * ROW))
                parts = _append(parts, part)
            out = _to_owners(parts, lane, LEVELS)
            if D is not None:
                out = gl.fma(own[2], skip, out)
            if z_q is not None:
                out = out * own[3]
            gl.store(y, out, mask=kept & (step < length) if MASKED else kept)
            y += y_move
            here = ahead
            own = next_own
    for i in gl.static_range(SHARE):
        state = lane * SHARE + i
        gl.store(new_state + cell + state, h[i], mask=kept & (state < states))
