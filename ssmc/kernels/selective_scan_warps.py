"""The selective scan of a prompt in Gluon, by two kinds of warps: *lanes* and *rows*.

A program takes a block of channels along the length, a group of T positions at a time. In the warps
of the lanes each channel has LANES neighbours, each with its share of the states, which stay in
registers; they do nothing but the recurrence. What belongs to one position and channel, that is
step size, gate and output, is computed once, by as many warps that lie along the rows of memory.
They copy bytes two groups ahead, hand step sizes to the lanes and take sums over states back, all
through shared memory. So the latencies of one kind are filled by the other.

There are at most as many programs as multiprocessors. Where blocks do not divide by them, some are
cut along the length: a program begins with the first part of its last block and ends with the last
part of its first block, which goes on from the states that the program before it left. So a program
waits at its end, if at all, and for what one that started earlier does first.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ssmc.kernels.arithmetic import LOG2E, parameter, scaled, silu, softplus
from ssmc.kernels.launch import await_inputs

AHEAD = gl.constexpr(2)  # groups of which bytes are copied before they are needed
COPIED_BYTES = 16  # at a time: what rows are to be aligned to


def constants(states: int, lanes: int, num_warps: int, group: int) -> dict[str, Any] | None:
    """The kernel's constants; None where a lane would get more than four states to hold."""
    num_warps = max(4, num_warps)  # registers are handed from kind to kind by four warps
    padded = triton.next_power_of_2(states)
    lanes = max(lanes, padded // 4)
    if lanes > 32:
        return None
    return {
        "LANES": lanes,
        "SHARE": max(1, padded // lanes),
        "T": min(32, max(group, lanes, num_warps)),
        "num_warps": num_warps,
    }


def share(blocks: int, groups: int, multiprocessors: int) -> int:
    """Groups that a program gets: at least a block's, so that no block is cut twice."""
    return max(groups, triton.cdiv(blocks * groups, multiprocessors))


@gluon.jit
def _append(items, item):
    return items + (item,)  # noqa: RUF005 (Triton knows no star)


@gluon.jit
def _halves(x, COUNT: gl.constexpr):
    """Each of COUNT tensors [rows, columns] as two of half the columns."""
    halves = ()
    for i in gl.static_range(COUNT):
        part = x[i]
        pairs = part.reshape((part.shape[0], 2, part.shape[1] // 2)).permute((0, 2, 1))
        low, high = gl.split(pairs)
        halves = _append(_append(halves, low), high)
    return halves


@gluon.jit
def _columns(x, LAYOUT: gl.constexpr):
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
def _joined(x, COUNT: gl.constexpr):
    """Each of the first COUNT tensors with the one COUNT after it, in a further dimension."""
    pairs = ()
    for i in gl.static_range(COUNT):
        pairs = _append(pairs, gl.join(x[i], x[i + COUNT]))
    return pairs


@gluon.jit
def _stacked(x, LEVELS: gl.constexpr):
    """2^LEVELS tensors of two dimensions as one of three, the last of them new; no data moves."""
    rows: gl.constexpr = x[0].shape[0]
    columns: gl.constexpr = x[0].shape[1]
    for level in gl.static_range(LEVELS):
        x = _joined(x, 1 << (LEVELS - 1 - level))
    return x[0].reshape((rows, columns, 1 << LEVELS))


@triton.jit
def _publish(flag):
    """Tell another program that what this one wrote is there."""
    tl.debug_barrier()
    tl.atomic_xchg(flag, 1, sem="release")


@triton.jit
def _await(flag):
    while tl.atomic_add(flag, 0, sem="acquire") == 0:
        pass


@triton.jit
def _all_warps():
    """Wait until all warps of this kind are here."""
    tl.debug_barrier()


@gluon.jit
def _arrive(barrier):
    """Tell the warps of the other kind that all warps of this one are here."""
    _all_warps()
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def _await_group(barriers, k):
    """Wait until the other kind has arrived for group k of the program; -1 is there at once."""
    mbarrier.wait(barriers.index(k & 1), (k >> 1) & 1)


@gluon.jit
def _part(number, low, high, groups):
    """(block, first group, end) of a program's part with this number."""
    block = (high - 1) // groups - number
    first = gl.maximum(low - block * groups, 0)
    return block, first, gl.minimum(high - block * groups, groups)


@gluon.jit
def _take(
    board,
    pairs,
    t: gl.constexpr,
    SHARE: gl.constexpr,
    GRID: gl.constexpr,
):
    """Of position t in a group dt and dt u B_scale [1, channels] and a lane's words of B and C."""
    LANES: gl.constexpr = GRID.threads_per_warp[0]
    CHANNELS: gl.constexpr = GRID.threads_per_warp[1]
    WARPS: gl.constexpr = GRID.warps_per_cta[1]
    STEPS: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, 2], [LANES, 1, CHANNELS, 1], [1, 1, WARPS, 1], [3, 2, 1, 0]
    )
    WORDS: gl.constexpr = gl.BlockedLayout(
        [1, 1, SHARE, 1], [1, LANES, 1, CHANNELS], [1, 1, 1, WARPS], [3, 2, 1, 0]
    )
    steps = board.slice(t, 1).load(gl.SliceLayout(0, STEPS))
    dt, dt_u = gl.split(steps.reshape((CHANNELS * WARPS, 2)))
    dt = gl.convert_layout(dt, gl.SliceLayout(0, GRID))[None, :]
    dt_u = gl.convert_layout(dt_u, gl.SliceLayout(0, GRID))[None, :]
    words = pairs.slice(t, 1).load(gl.SliceLayout(3, WORDS)).reshape((LANES, SHARE))
    return dt, dt_u, _columns(words, gl.SliceLayout(1, GRID))


@gluon.jit
def _advance(h, rates, taken, SHARE: gl.constexpr):
    """The states after a position, and the part of C h of the lane's own states."""
    dt, dt_u, words = taken
    reached = ()
    part = dt
    for i in gl.static_range(SHARE):
        word = words[i][:, None]
        B = (word & -65536).to(gl.float32, bitcast=True)
        C = (word << 16).to(gl.float32, bitcast=True)
        state = gl.fma(gl.exp2(dt * rates[i]), h[i], dt_u * B)
        reached = _append(reached, state)
        part = state * C if i == 0 else gl.fma(state, C, part)
    return reached, part


@gluon.jit
def _lanes(
    boards, pairs, sums, ready, done, flags, A, old_state, new_state, width, states, blocks,
    groups, low, high,
    LANES: gl.constexpr,
    SHARE: gl.constexpr,
    T: gl.constexpr,
    WARPS: gl.constexpr,
    CHAIN: gl.constexpr,
):  # fmt: skip
    """The recurrence; tensors are [LANES, channels], one element a lane."""
    CHANNELS: gl.constexpr = 32 // LANES
    GRID: gl.constexpr = gl.BlockedLayout([1, 1], [LANES, CHANNELS], [1, WARPS], [1, 0])
    lane = gl.arange(0, LANES, gl.SliceLayout(1, GRID))[:, None]
    column = gl.arange(0, CHANNELS * WARPS, gl.SliceLayout(0, GRID))[None, :]
    lane, column = gl.broadcast(lane, column)
    k = 0
    for number in range((high - 1) // groups - low // groups + 1):
        block, first, end = _part(number, low, high, groups)
        channel = (block % blocks) * (CHANNELS * WARPS) + column
        rates = ()
        for i in gl.static_range(SHARE):
            state = lane * SHARE + i
            mask = (channel < width) & (state < states)
            rate = gl.load(A + channel * states + state, mask=mask, other=0.0)
            rates = _append(rates, rate * LOG2E)
        await_inputs(CHAIN)
        resumed = first > 0
        if resumed:
            _await(flags + block)
        cell = ((block // blocks).to(gl.int64) * width + channel) * states
        h = ()
        for i in gl.static_range(SHARE):
            state = lane * SHARE + i
            mask = (channel < width) & (state < states)
            value = gl.load(new_state + cell + state, mask=mask & resumed, other=0.0)
            if old_state is not None:
                old = gl.load(old_state + cell + state, mask=mask & (first == 0), other=0.0)
                value = gl.where(resumed, value, old)
            h = _append(h, value)
        for _ in range(first, end):
            _await_group(ready, k)
            parts = ()
            for t in gl.static_range(T):
                taken = _take(boards.index(k & 1), pairs.index(k & 3), t, SHARE, GRID)
                h, part = _advance(h, rates, taken, SHARE)
                parts = _append(parts, part)
            stacked = _stacked(parts, T.bit_length() - 1).permute((2, 1, 0))
            sums.index(k & 1).store(stacked.reshape((T, WARPS, 32)))
            _arrive(done.index(k & 1))
            k += 1
        for i in gl.static_range(SHARE):
            state = lane * SHARE + i
            mask = (channel < width) & (state < states)
            gl.store(new_state + cell + state, h[i], mask=mask)
        if end < groups:
            _publish(flags + block)


@gluon.jit
def _copy(bytes_of, scales_of, pairs, k, sources, strides, at, scale, token, mask):
    """Begin to copy what group k needs: bytes of the positions `at` [T, 1], and B and C."""
    for i in gl.static_range(len(sources)):
        source = sources[i] + at.to(gl.int64) * strides[i]
        async_copy.async_copy_global_to_shared(bytes_of[i].index(k & 3), source, mask=mask)
    async_copy.async_copy_global_to_shared(scales_of.index(k & 3), scale)
    async_copy.async_copy_global_to_shared(pairs.index(k & 3), token)
    async_copy.commit_group()


@gluon.jit
def _at(step, length, REVERSE: gl.constexpr):
    """Where in the sequence the scan is at its steps; past the end at the last."""
    step = gl.minimum(step, length - 1)
    return length - 1 - step if REVERSE else step


@gluon.jit
def _load_scales(board, ROWS: gl.constexpr, V: gl.constexpr):
    """The scales of B and C [T, 1]."""
    threads: gl.constexpr = ROWS.threads_per_warp
    warps: gl.constexpr = ROWS.warps_per_cta
    PAIRS: gl.constexpr = gl.BlockedLayout(
        [1, V, 2], [threads[0], threads[1], 1], [warps[0], warps[1], 1], [2, 1, 0]
    )
    B_scale, C_scale = gl.split(board.load(gl.SliceLayout(1, PAIRS)))
    B_scale = gl.convert_layout(B_scale, gl.SliceLayout(1, ROWS))[:, None]
    return B_scale, gl.convert_layout(C_scale, gl.SliceLayout(1, ROWS))[:, None]


@gluon.jit
def _give(out, sums, gain, rest, mask, ROWS: gl.constexpr):
    """Write C h gain + rest [T, C] from the parts of C h [T, warps, 32] of the lanes."""
    T: gl.constexpr = out.shape[0]
    C: gl.constexpr = out.shape[1]
    WARPS: gl.constexpr = ROWS.warps_per_cta[0]
    SUMS: gl.constexpr = gl.BlockedLayout(
        [1, 1, T], [T // WARPS, WARPS, 32 // T], [WARPS, 1, 1], [2, 1, 0]
    )
    parts = sums.load(SUMS).reshape((T, C, 32 * WARPS // C))
    value = gl.convert_layout(gl.sum(parts, 2), ROWS)
    gl.store(out, gl.fma(value, gain, rest), mask=mask)


@gluon.jit
def _rows(
    boards, pairs, sums, bytes_of, scales_of, ready, done, u_q, u_scale, dt_q, dt_scale, dt_bias,
    tokens, token_scales, D, z_q, z_scale, y, length, width, rows, blocks, groups, low, high,
    u_scale_stride, dt_scale_stride, z_scale_stride, u_batch, u_row, dt_batch, dt_row, z_batch,
    z_row,
    SOFTPLUS: gl.constexpr,
    REVERSE: gl.constexpr,
    EVEN: gl.constexpr,
    LANES: gl.constexpr,
    SHARE: gl.constexpr,
    T: gl.constexpr,
    WARPS: gl.constexpr,
    CHAIN: gl.constexpr,
):  # fmt: skip
    """Step sizes, gates and outputs; tensors [T, C] lie along the rows of memory."""
    C: gl.constexpr = 32 // LANES * WARPS
    N: gl.constexpr = LANES * SHARE
    V: gl.constexpr = T // LANES
    VECTOR: gl.constexpr = min(16, C)
    ROWS: gl.constexpr = gl.BlockedLayout([1, V], [T // WARPS, 32 * WARPS // T], [WARPS, 1], [1, 0])
    BYTES: gl.constexpr = gl.BlockedLayout(
        [1, VECTOR], [32 * VECTOR // C, C // VECTOR], [WARPS, 1], [1, 0]
    )
    WORDS: gl.constexpr = gl.BlockedLayout(
        [1, 1, SHARE], [32 // LANES, LANES, 1], [WARPS, 1, 1], [2, 1, 0]
    )
    SCALES: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [WARPS, 1], [1, 0])
    row = gl.arange(0, T, gl.SliceLayout(1, ROWS))[:, None]
    column = gl.arange(0, C, gl.SliceLayout(0, ROWS))
    source_row = gl.arange(0, T, gl.SliceLayout(1, BYTES))[:, None]
    source_column = gl.arange(0, C, gl.SliceLayout(0, BYTES))[None, :]
    word = gl.arange(0, T, gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))[:, None, None] * N
    word += gl.arange(0, LANES, gl.SliceLayout(0, gl.SliceLayout(2, WORDS)))[None, :, None] * SHARE
    word += gl.arange(0, SHARE, gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))[None, None, :]
    pair = gl.arange(0, T, gl.SliceLayout(1, SCALES))[:, None] * 2
    pair += gl.arange(0, 2, gl.SliceLayout(0, SCALES))[None, :]

    # What is written of a group comes after the step sizes of the next: the lanes are to go on.
    out = y + column[None, :]
    out_step = row + length
    out_channel = 0
    gain = gl.full([T, C], 0.0, gl.float32, ROWS)
    rest = gain
    k = 0
    for number in range((high - 1) // groups - low // groups + 1):
        block, first, end = _part(number, low, high, groups)
        batch = (block // blocks).to(gl.int64)
        start = (block % blocks) * C
        channel = start + column
        u_s = parameter(u_scale, u_scale_stride, channel, width)[None, :]
        dt_s = parameter(dt_scale, dt_scale_stride, channel, width)[None, :]
        z_s = parameter(z_scale, z_scale_stride, channel, width)[None, :]
        skip = parameter(D, 1, channel, width)[None, :]
        bias = parameter(dt_bias, 1, channel, width)[None, :]
        await_inputs(CHAIN)

        step = first * T + row
        target = y + batch * length * width + channel[None, :]
        # Up to here the rows go, and a mask that ends at 16 does not break a copy apart.
        source_channel = start + source_column
        mask = None if EVEN else source_channel < gl.cdiv(width, 16) * 16
        source_step = first * T + source_row
        sources = (
            u_q + batch * u_batch + source_channel,
            dt_q + batch * dt_batch + source_channel,
        )
        strides = (u_row, dt_row, z_row)
        if z_q is not None:
            sources = _append(sources, z_q + batch * z_batch + source_channel)
        token = tokens + (batch * rows + first * T) * N + word
        scale = token_scales + (batch * rows + first * T) * 2 + pair

        async_copy.wait_group(0)
        for i in gl.static_range(AHEAD):
            at = _at(source_step, length, REVERSE)
            _copy(bytes_of, scales_of, pairs, k + i, sources, strides, at, scale, token, mask)
            token += T * N
            scale += T * 2
            source_step += T
        for _ in range(first, end):
            async_copy.wait_group(1)
            u = scaled(bytes_of[0].index(k & 3).load(ROWS), u_s)
            dt = scaled(bytes_of[1].index(k & 3).load(ROWS), dt_s) + bias
            if z_q is not None:
                z = scaled(bytes_of[2].index(k & 3).load(ROWS), z_s)
            B_scale, C_scale = _load_scales(scales_of.index(k & 3), ROWS, V)
            if SOFTPLUS:
                dt = softplus(dt)
            # A step of zero past the end leaves a state as it is.
            dt = gl.where(step < length, dt, 0.0)
            boards.index(k & 1).store(gl.join(dt, dt * u * B_scale))
            _arrive(ready.index(k & 1))

            _await_group(done, k - 1)
            inside = out_step < length
            if not EVEN:
                inside &= (out_channel + column < width)[None, :]
            at = _at(out_step, length, REVERSE).to(gl.int64)
            _give(out + at * width, sums.index((k & 1) ^ 1), gain, rest, inside, ROWS)
            out = target
            out_step = step
            out_channel = start
            gate = 1.0
            if z_q is not None:
                gate = silu(z)
            rest = u * skip * gate
            gain = gl.broadcast(C_scale * gate, u)[0]
            at = _at(source_step, length, REVERSE)
            _copy(bytes_of, scales_of, pairs, k + AHEAD, sources, strides, at, scale, token, mask)
            token += T * N
            scale += T * 2
            source_step += T
            step += T
            k += 1
    async_copy.wait_group(0)
    _await_group(done, k - 1)
    inside = out_step < length
    if not EVEN:
        inside &= (out_channel + column < width)[None, :]
    at = _at(out_step, length, REVERSE).to(gl.int64)
    _give(out + at * width, sums.index((k & 1) ^ 1), gain, rest, inside, ROWS)


@gluon.jit(do_not_specialize=["groups", "total", "share"])
def scan_kernel(
    u_q, u_scale, dt_q, dt_scale, A, dt_bias, tokens, token_scales, flags, D, z_q, z_scale,
    old_state, y, new_state, length, width, states, rows, blocks, groups, total, share,
    u_scale_stride, dt_scale_stride, z_scale_stride, u_batch, u_row, dt_batch, dt_row, z_batch,
    z_row,
    SOFTPLUS: gl.constexpr,
    REVERSE: gl.constexpr,
    EVEN: gl.constexpr,
    LANES: gl.constexpr,
    SHARE: gl.constexpr,
    T: gl.constexpr,
    num_warps: gl.constexpr,
    CHAIN: gl.constexpr,
):  # fmt: skip
    """`share` of the `total` groups of positions of all blocks of channels, `blocks` a sequence.

    `tokens` [batch, rows, N] and `token_scales` [batch, rows, 2] are B and C in the order of the
    scan and go on for AHEAD groups past the end. `flags`, one a block, are zero.
    """
    C: gl.constexpr = 32 // LANES * num_warps
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    CUBE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    SWIZZLED: gl.constexpr = gl.SwizzledSharedLayout(4, 1, min(8, num_warps), [2, 1, 0])
    boards = gl.allocate_shared_memory(gl.float32, [2, T, C, 2], CUBE)
    sums = gl.allocate_shared_memory(gl.float32, [2, T, num_warps, 32], SWIZZLED)
    pairs = gl.allocate_shared_memory(gl.int32, [4, T, LANES, SHARE], CUBE)
    scales_of = gl.allocate_shared_memory(gl.float32, [4, T, 2], PLAIN)
    bytes_of = ()
    for _ in gl.static_range(2 if z_q is None else 3):
        bytes_of = _append(bytes_of, gl.allocate_shared_memory(gl.int8, [4, T, C], PLAIN))
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(done.index(i), count=1)
    low = gl.program_id(0) * share
    high = gl.minimum(low + share, total)
    REGISTERS: gl.constexpr = 108 // num_warps * 8  # the lanes get what is left, some more
    gl.warp_specialize(
        [
            (_lanes, (
                boards, pairs, sums, ready, done, flags, A, old_state, new_state, width, states,
                blocks, groups, low, high, LANES, SHARE, T, num_warps, CHAIN,
            )),
            (_rows, (
                boards, pairs, sums, bytes_of, scales_of, ready, done, u_q, u_scale, dt_q,
                dt_scale, dt_bias, tokens, token_scales, D, z_q, z_scale, y, length, width, rows,
                blocks, groups, low, high, u_scale_stride, dt_scale_stride, z_scale_stride,
                u_batch, u_row, dt_batch, dt_row, z_batch, z_row, SOFTPLUS, REVERSE, EVEN, LANES,
                SHARE, T, num_warps, CHAIN,
            )),
        ],
        [num_warps],
        [REGISTERS],
    )  # fmt: skip
