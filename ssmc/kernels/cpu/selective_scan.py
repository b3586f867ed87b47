"""The selective scan of Mamba: lanes are channels, which go through the states one by one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssmc import ops
from ssmc.errors import UsageError
from ssmc.kernels.cpu.launch import contiguous, empty, kernel, launch, rows, run_torch, vector
from ssmc.kernels.cpu.numbers import LOG2E, exp2, silu, softplus
from ssmc.kernels.cpu.words import float32_at, int8_at, int64_at

WIDTH = 32  # channels at a time
F32 = np.float32
ZERO = F32(0)


@kernel()
def _scan(arguments, thread, threads):
    """u, its stride and scale, dt, its stride and scale, A, B, its stride and scale, C, its stride
    and scale, D, z, its stride and scale, dt_bias, state, new state, y, batch, length, channels,
    states, softplus, reverse."""
    a = int64_at(arguments, 27)
    batch, length, width, rank = a[21], a[22], a[23], a[24]
    h, decay = np.empty(rank * WIDTH, F32), np.empty(rank * WIDTH, F32)
    u, dt, dt_u = np.zeros(WIDTH, F32), np.zeros(WIDTH, F32), np.zeros(WIDTH, F32)
    y, gate = np.zeros(WIDTH, F32), np.ones(WIDTH, F32)
    skip, bias = np.zeros(WIDTH, F32), np.zeros(WIDTH, F32)
    blocks = (width + WIDTH - 1) // WIDTH
    for unit in range(batch * blocks * thread // threads, batch * blocks * (thread + 1) // threads):
        sequence, first = unit // blocks, unit % blocks * WIDTH
        n = min(WIDTH, width - first)
        A = float32_at(a[6] + 4 * first * rank, n * rank)
        h[:], decay[:] = ZERO, ZERO
        for i in range(n):
            for s in range(rank):
                decay[s * WIDTH + i] = A[i * rank + s] * LOG2E
        if a[18]:
            state = float32_at(a[18] + 4 * (sequence * width + first) * rank, n * rank)
            for i in range(n):
                for s in range(rank):
                    h[s * WIDTH + i] = state[i * rank + s]
        if a[13]:
            skip[:n] = float32_at(a[13] + 4 * first, n)
        if a[17]:
            bias[:n] = float32_at(a[17] + 4 * first, n)
        u_scale, dt_scale = float32_at(a[2] + 4 * first, n), float32_at(a[5] + 4 * first, n)
        for step in range(length):
            row = sequence * length + (length - 1 - step if a[26] else step)
            u_q, dt_q = int8_at(a[0] + row * a[1] + first, n), int8_at(a[3] + row * a[4] + first, n)
            for i in range(n):
                u[i] = np.float32(u_q[i]) * u_scale[i]
                dt[i] = np.float32(dt_q[i]) * dt_scale[i] + bias[i]
            if a[25]:
                for i in range(WIDTH):
                    dt[i] = softplus(dt[i])
            for i in range(WIDTH):
                dt_u[i] = dt[i] * u[i]
                y[i] = skip[i] * u[i]
            B, C = int8_at(a[7] + row * a[8], rank), int8_at(a[10] + row * a[11], rank)
            B_scale, C_scale = float32_at(a[9], row + 1)[row], float32_at(a[12], row + 1)[row]
            for s in range(rank):
                b, c = np.float32(B[s]) * B_scale, np.float32(C[s]) * C_scale
                factor, here = decay[s * WIDTH : (s + 1) * WIDTH], h[s * WIDTH : (s + 1) * WIDTH]
                for i in range(WIDTH):
                    value = exp2(dt[i] * factor[i]) * here[i] + dt_u[i] * b
                    here[i] = value
                    y[i] += value * c
            if a[14]:
                z, z_scale = int8_at(a[14] + row * a[15] + first, n), float32_at(a[16] + 4 * first, n)
                for i in range(n):
                    gate[i] = silu(np.float32(z[i]) * z_scale[i])
            out = float32_at(a[20] + 4 * (row * width + first), n)
            for i in range(n):
                out[i] = y[i] * gate[i]
        new = float32_at(a[19] + 4 * (sequence * width + first) * rank, n * rank)
        for i in range(n):
            for s in range(rank):
                new[i * rank + s] = h[s * WIDTH + i]


def _plain(scale: Tensor | None, *allowed: int) -> bool:
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
    operands = (u_q, u_scale, dt_q, dt_scale, A, B_q, B_scale, C_q, C_scale, D, z_q, z_scale)
    return scan(*operands, dt_bias, state, softplus, reverse, None)


def scan(
    u_q: Tensor,
    u_scale: Tensor,
    dt_q: Tensor,
    dt_scale: Tensor,
    A: Tensor,
    B_q: Tensor,
    B_scale: Tensor,
    C_q: Tensor,
    C_scale: Tensor,
    D: Tensor | None,
    z_q: Tensor | None,
    z_scale: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    softplus: bool,
    reverse: bool,
    new_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`int8_selective_scan` with the memory for the new state, which may be that of the old."""
    if (z_q is None) != (z_scale is None):
        raise UsageError("ssmc::int8_selective_scan: z_q and z_scale come together or not at all")
    batch, length, width = u_q.shape
    rank, tokens = A.shape[1], batch * length
    channels = (u_scale, dt_scale, z_scale)
    given = (u_q, u_scale, dt_q, dt_scale, A, B_q, B_scale, C_q, C_scale, D, z_q, z_scale)
    by_token = all(_plain(s, 1) or s.shape[-1] == 1 for s in (B_scale, C_scale))
    if not by_token or not all(_plain(s, 1, width) for s in channels):
        return run_torch(ops.int8_selective_scan, *given, dt_bias, state, softplus, reverse)
    u, _, u_apart = rows(u_q)
    dt, _, dt_apart = rows(dt_q)
    B, _, B_apart = rows(B_q)
    C, _, C_apart = rows(C_q)
    z, _, z_apart = (None, 0, 0) if z_q is None else rows(z_q)
    y = empty((batch, length, width))
    new = empty((batch, width, rank)) if new_state is None else new_state
    launch(
        _scan, u, u_apart, vector(u_scale, width), dt, dt_apart, vector(dt_scale, width),
        contiguous(A), B, B_apart, vector(B_scale, tokens), C, C_apart, vector(C_scale, tokens), D,
        z, z_apart, vector(z_scale, width), dt_bias,
        None if state is None else contiguous(state), new, y, batch, length, width, rank,
        int(softplus), int(reverse),
    )  # fmt: skip
    return y, new
