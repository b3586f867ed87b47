"""The selective scan of Mamba: lanes are channels, which go through the states one by one."""

from __future__ import annotations

import numpy as np
from numba import njit
from torch import Tensor

from ssmc import ops
from ssmc.errors import UsageError
from ssmc.kernels.cpu.kernel import kernel
from ssmc.kernels.cpu.lanes import dequantise, dequantise_token, gated, recurrence, softplus_of
from ssmc.kernels.cpu.launch import contiguous, empty, launch, rows, run_torch, vector
from ssmc.kernels.cpu.numbers import LOG2E
from ssmc.kernels.cpu.vectors import ROWS, transpose_block
from ssmc.kernels.cpu.words import arguments_at, float32_at, int8_at, keep, scratch, share

WIDTH, BLOCKS = 32, 2  # channels at a time, and registers that hold them
ROW = 4 * WIDTH  # bytes of a float32 of each
CHUNK = 16  # positions at a time: step sizes and gates of one do not wait for those of another
F32 = np.float32
ZERO = F32(0)

# Where a thread has what, in bytes: parameters of the channels, a chunk's u, step sizes and y, some
# integers; from STATES on the states, their decays, and a position's B and C.
U_SCALE, DT_SCALE, Z_SCALE, SKIP, BIAS, ZEROS = (ROW * i for i in range(6))
U, SIZES, Y = (ROW * (6 + CHUNK * i) for i in range(3))
INTEGERS = ROW * (6 + CHUNK * 3)
STATES = INTEGERS + ROW


@njit
def room_for(rank):
    """Bytes of all that."""
    return STATES + 2 * rank * ROW + 2 * rank * 4


@njit
def _parameters(address, first, n, out):
    """Parameters of channels from `first` on, in lanes; zeros where there are none."""
    count, lanes = n if address else 0, float32_at(out, WIDTH)
    values = float32_at(address + 4 * first, count)
    for i in range(count):
        lanes[i] = values[i]
    for i in range(count, WIDTH):
        lanes[i] = ZERO


@njit
def _to_lanes(rows, rank, n, lanes):
    """[n, rank] at an address to [rank, WIDTH] at another, the lanes behind n zero."""
    if n == WIDTH and rank % ROWS == 0:
        for i in range(0, WIDTH, ROWS):
            for s in range(0, rank, ROWS):
                place = lanes + 4 * (s * WIDTH + i)
                transpose_block(place, ROW, rows + 4 * (i * rank + s), 4 * rank)
        return
    values, out = float32_at(rows, n * rank), float32_at(lanes, rank * WIDTH)
    out[:] = ZERO
    for i in range(n):
        for s in range(rank):
            out[s * WIDTH + i] = values[i * rank + s]


@njit
def from_lanes(lanes, rank, n, rows):
    """[rank, WIDTH] at an address to [n, rank] at another."""
    if n == WIDTH and rank % ROWS == 0:
        for i in range(0, WIDTH, ROWS):
            for s in range(0, rank, ROWS):
                place = lanes + 4 * (s * WIDTH + i)
                transpose_block(rows + 4 * (i * rank + s), 4 * rank, place, ROW)
        return
    values, out = float32_at(lanes, rank * WIDTH), float32_at(rows, n * rank)
    for i in range(n):
        for s in range(rank):
            out[i * rank + s] = values[s * WIDTH + i]


@njit
def begin(scales, first, n, room):
    """The parameters of n channels from `first` on.

    `scales` are the addresses of the scales of u, of dt and of z, of D and of dt_bias.
    """
    for i in range(5):
        _parameters(scales[i], first, n, room + ROW * i)


@njit
def begin_states(A, state, n, rank, room):
    """The decays of n channels, and their states or zeros, in lanes."""
    _to_lanes(A, rank, n, room + STATES + ROW * rank)
    decays = float32_at(room + STATES + ROW * rank, WIDTH * rank)
    for i in range(WIDTH * rank):
        decays[i] *= LOG2E
    if state:
        _to_lanes(state, rank, n, room + STATES)
    else:
        float32_at(room + STATES, WIDTH * rank)[:] = ZERO


@njit
def _whole(q, n, room):
    """The address of WIDTH int8: where they are, or where fewer than that are copied to."""
    if n == WIDTH:
        return q
    values, copied = int8_at(q, n), int8_at(room + INTEGERS, n)
    for i in range(n):
        copied[i] = values[i]
    return room + INTEGERS


@njit
def of_token(q, scale, rank, out):
    """int8 [rank] times their scale, both at addresses, to float32 at another."""
    dequantise_token(out, q, scale, rank // ROWS)
    integers, values, factor = int8_at(q, rank), float32_at(out, rank), float32_at(scale, 1)[0]
    for s in range(rank // ROWS * ROWS, rank):
        values[s] = F32(integers[s]) * factor


@njit
def inputs(u, u_apart, dt, dt_apart, count, n, positive, room):
    """u and the step sizes of up to CHUNK positions, which are that far apart."""
    for i in range(count):
        q = _whole(u + i * u_apart, n, room)
        dequantise(room + U + ROW * i, q, room + U_SCALE, room + ZEROS, BLOCKS)
        q = _whole(dt + i * dt_apart, n, room)
        dequantise(room + SIZES + ROW * i, q, room + DT_SCALE, room + BIAS, BLOCKS)
    if positive:
        softplus_of(room + SIZES, count * BLOCKS)


@njit
def write(y, z, n, room, out):
    """y of a position, gated where there is z, to `out`."""
    if z:
        z = _whole(z, n, room)
        gated(out if n == WIDTH else y, y, z, room + Z_SCALE, BLOCKS)
    if n < WIDTH or not z:
        values, written = float32_at(y, n), float32_at(out, n)
        for i in range(n):
            written[i] = values[i]


@njit
def advance(rows, apart, scales, after, rank, count, n, positive, room):
    """Up to CHUNK positions of n channels.

    `rows` are the addresses of u, dt, z (or 0), B, C and y of the first position, `apart` how far
    they are from one another, `scales` the addresses of those of B and C, which are `after` bytes
    apart.
    """
    u, dt, z, B, C, out = rows
    states, decays = room + STATES, room + STATES + ROW * rank
    b, c = decays + ROW * rank, decays + ROW * rank + 4 * rank
    inputs(u, apart[0], dt, apart[1], count, n, positive, room)
    for i in range(count):
        of_token(B + i * apart[3], scales[0] + i * after, rank, b)
        of_token(C + i * apart[4], scales[1] + i * after, rank, c)
        size, value, y = room + SIZES + ROW * i, room + U + ROW * i, room + Y + ROW * i
        recurrence(states, decays, b, c, rank, size, value, room + SKIP, y)
    for i in range(count):
        write(room + Y + ROW * i, z + i * apart[2] if z else 0, n, room, out + i * apart[5])


@kernel()
def _scan(arguments, thread, threads):
    (
        u, u_apart, u_scale, dt, dt_apart, dt_scale, A, B, B_apart, B_scale, C, C_apart, C_scale, D,
        z, z_apart, z_scale, dt_bias, state, new, out, batch, length, width, rank, positive,
        backwards,
    ) = arguments_at(arguments, 27)  # fmt: skip
    memory, room = scratch(room_for(rank))
    blocks, sign = (width + WIDTH - 1) // WIDTH, -1 if backwards else 1
    apart = (
        sign * u_apart, sign * dt_apart, sign * z_apart, sign * B_apart, sign * C_apart,
        sign * 4 * width,
    )  # fmt: skip
    for unit in share(batch * blocks, thread, threads):
        sequence, first = unit // blocks, unit % blocks * WIDTH
        n, offset = min(WIDTH, width - first), 4 * (sequence * width + first) * rank
        given = state + offset if state else 0
        begin((u_scale, dt_scale, z_scale, D, dt_bias), first, n, room)
        begin_states(A + 4 * first * rank, given, n, rank, room)
        for step in range(0, length, CHUNK):
            row = sequence * length + (length - 1 - step if backwards else step)
            places = (
                u + row * u_apart + first, dt + row * dt_apart + first,
                z + row * z_apart + first if z else 0, B + row * B_apart, C + row * C_apart,
                out + 4 * (row * width + first),
            )  # fmt: skip
            token_scales, count = (B_scale + 4 * row, C_scale + 4 * row), min(CHUNK, length - step)
            advance(places, apart, token_scales, 4 * sign, rank, count, n, positive, room)
        from_lanes(room + STATES, rank, n, new + offset)
    keep(memory)


def plain(scale: Tensor | None, *allowed: int) -> bool:
    """Whether a scale, where there is one, has one of these numbers of values."""
    return scale is None or scale.numel() in allowed


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
) -> tuple[Tensor, Tensor]:
    """As ssmc::int8_selective_scan."""
    if (z_q is None) != (z_scale is None):
        raise UsageError("ssmc::int8_selective_scan: z_q and z_scale come together or not at all")
    batch, length, width = u_q.shape
    rank, tokens = A.shape[1], batch * length
    channels = (u_scale, dt_scale, z_scale)
    given = (u_q, u_scale, dt_q, dt_scale, A, B_q, B_scale, C_q, C_scale, D, z_q, z_scale)
    by_token = all(plain(s, 1) or s.shape[-1] == 1 for s in (B_scale, C_scale))
    if not by_token or not all(plain(s, 1, width) for s in channels):
        return run_torch(ops.int8_selective_scan, *given, dt_bias, state, softplus, reverse)
    u, _, u_apart = rows(u_q)
    dt, _, dt_apart = rows(dt_q)
    B, _, B_apart = rows(B_q)
    C, _, C_apart = rows(C_q)
    z, _, z_apart = (None, 0, 0) if z_q is None else rows(z_q)
    y = empty((batch, length, width))
    new = empty((batch, width, rank))
    launch(
        _scan, u, u_apart, vector(u_scale, width), dt, dt_apart, vector(dt_scale, width),
        contiguous(A), B, B_apart, vector(B_scale, tokens), C, C_apart, vector(C_scale, tokens), D,
        z, z_apart, vector(z_scale, width), dt_bias,
        None if state is None else contiguous(state), new, y, batch, length, width, rank,
        int(softplus), int(reverse), work=4 * tokens * width * rank,
    )  # fmt: skip
    return y, new
