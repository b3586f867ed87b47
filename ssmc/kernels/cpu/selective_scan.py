"""The selective scan of Mamba: lanes are channels, which go through the states one by one."""

from __future__ import annotations

import numpy as np
from numba import njit
from torch import Tensor

from ssmc import ops
from ssmc.errors import UsageError
from ssmc.kernels.cpu.launch import contiguous, empty, kernel, launch, rows, run_torch, vector
from ssmc.kernels.cpu.numbers import LOG2E, exp2, silu, softplus
from ssmc.kernels.cpu.vectors import ROWS, transpose_block
from ssmc.kernels.cpu.words import arguments_at, float32_at, int8_at, share

WIDTH = 32  # channels at a time
F32 = np.float32
ZERO = F32(0)


@njit
def parameters(address, first, n, out):
    """Parameters of channels from `first` on, in lanes; zeros where there are none."""
    count = n if address else 0
    values = float32_at(address + 4 * first, count)
    for i in range(count):
        out[i] = values[i]
    for i in range(count, WIDTH):
        out[i] = ZERO


@njit
def to_lanes(rows, rank, n, lanes):
    """[n, rank] at an address to [rank, WIDTH], the lanes behind n zero."""
    if n == WIDTH and rank % ROWS == 0:
        out = lanes.ctypes.data
        for i in range(0, WIDTH, ROWS):
            for s in range(0, rank, ROWS):
                place = out + 4 * (s * WIDTH + i)
                transpose_block(place, 4 * WIDTH, rows + 4 * (i * rank + s), 4 * rank)
        return
    lanes[:] = ZERO
    values = float32_at(rows, n * rank)
    for i in range(n):
        for s in range(rank):
            lanes[s * WIDTH + i] = values[i * rank + s]


@njit
def from_lanes(lanes, rank, n, rows):
    """[rank, WIDTH] to [n, rank] at an address."""
    if n == WIDTH and rank % ROWS == 0:
        source = lanes.ctypes.data
        for i in range(0, WIDTH, ROWS):
            for s in range(0, rank, ROWS):
                place = source + 4 * (s * WIDTH + i)
                transpose_block(rows + 4 * (i * rank + s), 4 * rank, place, 4 * WIDTH)
        return
    values = float32_at(rows, n * rank)
    for i in range(n):
        for s in range(rank):
            values[i * rank + s] = lanes[s * WIDTH + i]


@njit(fastmath={"contract"})
def inputs(u, dt, n, u_scale, dt_scale, bias, positive, u_now, dt_now):
    """A position's u and step sizes of WIDTH channels, those behind n zero in u."""
    integers, sizes = int8_at(u, n), int8_at(dt, n)
    for i in range(n):
        u_now[i] = F32(integers[i]) * u_scale[i]
        dt_now[i] = F32(sizes[i]) * dt_scale[i] + bias[i]
    if positive:
        for i in range(WIDTH):
            dt_now[i] = softplus(dt_now[i])


@njit(fastmath={"contract"})
def advance(B, B_scale, C, C_scale, u, dt, dt_u, decay, skip, h, y):
    """h = 2^(dt decay) h + dt u B for each state of WIDTH channels; y = C h + D u."""
    for i in range(WIDTH):
        dt_u[i] = dt[i] * u[i]
        y[i] = skip[i] * u[i]
    for s in range(len(B)):
        b, c = F32(B[s]) * B_scale, F32(C[s]) * C_scale
        factor, here = decay[s * WIDTH : (s + 1) * WIDTH], h[s * WIDTH : (s + 1) * WIDTH]
        for i in range(WIDTH):
            value = exp2(dt[i] * factor[i]) * here[i] + dt_u[i] * b
            here[i] = value
            y[i] += value * c


@njit(fastmath={"contract"})
def gate(z, scale, y, out):
    """out = y, times silu(z) where there is an address of it."""
    if z:
        gates = int8_at(z, len(out))
        for i in range(len(out)):
            out[i] = y[i] * silu(F32(gates[i]) * scale[i])
    else:
        for i in range(len(out)):
            out[i] = y[i]


@kernel()
def _scan(arguments, thread, threads):
    (
        u, u_apart, u_scale, dt, dt_apart, dt_scale, A, B, B_apart, B_scale, C, C_apart, C_scale, D,
        z, z_apart, z_scale, dt_bias, state, new, out, batch, length, width, rank, positive,
        backwards,
    ) = arguments_at(arguments, 27)  # fmt: skip
    B_scales, C_scales = float32_at(B_scale, batch * length), float32_at(C_scale, batch * length)
    h, decay = np.zeros(rank * WIDTH, F32), np.empty(rank * WIDTH, F32)
    lanes = np.zeros((9, WIDTH), F32)
    us, dts, zs, skip, bias = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4]
    u_now, dt_now, dt_u, y = lanes[5], lanes[6], lanes[7], lanes[8]
    blocks = (width + WIDTH - 1) // WIDTH
    for unit in share(batch * blocks, thread, threads):
        sequence, first = unit // blocks, unit % blocks * WIDTH
        n, offset = min(WIDTH, width - first), 4 * (sequence * width + first) * rank
        parameters(u_scale, first, n, us)
        parameters(dt_scale, first, n, dts)
        parameters(z_scale, first, n, zs)
        parameters(D, first, n, skip)
        parameters(dt_bias, first, n, bias)
        to_lanes(A + 4 * first * rank, rank, n, decay)
        for i in range(rank * WIDTH):
            decay[i] *= LOG2E
        h[:] = ZERO
        if state:
            to_lanes(state + offset, rank, n, h)
        for step in range(length):
            row = sequence * length + (length - 1 - step if backwards else step)
            u_row, dt_row = u + row * u_apart + first, dt + row * dt_apart + first
            inputs(u_row, dt_row, n, us, dts, bias, positive, u_now, dt_now)
            b, c = int8_at(B + row * B_apart, rank), int8_at(C + row * C_apart, rank)
            advance(b, B_scales[row], c, C_scales[row], u_now, dt_now, dt_u, decay, skip, h, y)
            written = float32_at(out + 4 * (row * width + first), n)
            gate(z + row * z_apart + first if z else 0, zs, y, written)
        from_lanes(h, rank, n, new + offset)


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
