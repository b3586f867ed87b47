"""A step of Mamba's scan and what is in front of it: norms, rounding and dt_proj, in one kernel.

Each thread does the norms and the rounding of a token, which are little, for itself.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ssmc import ops
from ssmc.kernels.cpu.launch import (
    contiguous,
    empty,
    kernel,
    launch,
    narrowed,
    rows,
    run_torch,
    vector,
    widened,
)
from ssmc.kernels.cpu.linear import add, copy_rows
from ssmc.kernels.cpu.norm import normalise
from ssmc.kernels.cpu.numbers import LOG2E
from ssmc.kernels.cpu.products import rows_product
from ssmc.kernels.cpu.quantize import quantize_row
from ssmc.kernels.cpu.selective_scan import (
    WIDTH,
    advance,
    from_lanes,
    gate,
    inputs,
    parameters,
    plain,
    to_lanes,
)
from ssmc.kernels.cpu.vectors import ROWS
from ssmc.kernels.cpu.words import (
    arguments_at,
    float32_at,
    float_of_bits,
    keep,
    share,
    to_int8,
)

F32 = np.float32
ZERO, ONE = F32(0), F32(1)


@njit
def _round(x, n, normed, weight, eps, room, q):
    """Round float32 [n] at an address, or its norm, to q; the scale."""
    values = float32_at(x, n)
    if normed:
        normalise(values, weight, eps, room[:n])
        return quantize_row(room[:n], q)
    return quantize_row(values, q)


@njit
def _step_sizes(low, scale, w, w_scale, bias, out_scale, rank, first, n, width, room, sums, y, q):
    """dt_proj of n channels from `first` on, rounded to q; low int8 [64 blocks]."""
    blocks = (rank + 63) // 64
    wide, factor = blocks * 64, np.float64(scale)
    for begin in range(first, first + n, ROWS):
        count, source, apart = min(ROWS, first + n - begin), w + begin * rank, rank
        if (begin + count - 1) * rank + wide > width * rank:  # it would be read beyond its end
            copy_rows(source, rank, count, rank, room.ctypes.data, wide)
            source, apart = room.ctypes.data, wide
        rows_product(sums.ctypes.data, low.ctypes.data, source, apart, count, blocks)
        rounded = q[begin - first : begin - first + count]
        factors = float32_at(w_scale + 4 * begin, count)
        for i in range(count):
            y[i] = F32(np.float64(sums[i]) * (factor * np.float64(factors[i])))
        if bias:
            add(float32_at(bias + 4 * begin, count), y)
        scales = float32_at(out_scale + 4 * begin, count)
        for i in range(count):
            rounded[i] = to_int8(y[i], ONE / scales[i])


@kernel()
def _step(arguments, thread, threads):
    (
        x, apart, low_n, normed, dt_norm, B_norm, C_norm, eps, w, w_scale, bias, dt_scale, u,
        u_apart, u_scale, A, D, z, z_apart, z_scale, dt_bias, state, out, batch, width, rank,
        positive,
    ) = arguments_at(arguments, 27)  # fmt: skip
    blocks, wide, least = (width + WIDTH - 1) // WIDTH, (low_n + 63) // 64 * 64, float_of_bits(eps)
    low, B, C = np.zeros(wide, np.int8), np.empty(rank, np.int8), np.empty(rank, np.int8)
    padded, dt, room = (
        np.zeros(ROWS * wide, np.int8),
        np.zeros(WIDTH, np.int8),
        np.empty(max(low_n, rank), F32),
    )
    h, decay, lanes = (
        np.empty(rank * WIDTH, F32),
        np.empty(rank * WIDTH, F32),
        np.zeros((9, WIDTH), F32),
    )
    us, dts, zs, skip, shift = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4]
    u_now, dt_now, dt_u, y = lanes[5], lanes[6], lanes[7], lanes[8]
    sums, sizes = np.empty(ROWS, np.int32), np.empty(ROWS, F32)
    done, low_scale, b_scale, c_scale = -1, ONE, ONE, ONE
    for unit in share(batch * blocks, thread, threads):
        sequence, first = unit // blocks, unit % blocks * WIDTH
        n, offset = min(WIDTH, width - first), 4 * (sequence * width + first) * rank
        if sequence != done:
            row = x + 4 * sequence * apart
            low_scale = _round(row, low_n, normed, dt_norm, least, room, low[:low_n])
            b_scale = _round(row + 4 * low_n, rank, normed, B_norm, least, room, B)
            c_scale = _round(row + 4 * (low_n + rank), rank, normed, C_norm, least, room, C)
            done = sequence
        _step_sizes(
            low, low_scale, w, w_scale, bias, dt_scale, low_n, first, n, width, padded, sums, sizes,
            dt,
        )  # fmt: skip
        parameters(u_scale, first, n, us)
        parameters(dt_scale, first, n, dts)
        parameters(z_scale, first, n, zs)
        parameters(D, first, n, skip)
        parameters(dt_bias, first, n, shift)
        to_lanes(A + 4 * first * rank, rank, n, decay)
        for i in range(rank * WIDTH):
            decay[i] *= LOG2E
        to_lanes(state + offset, rank, n, h)
        u_row = u + sequence * u_apart + first
        inputs(u_row, dt.ctypes.data, n, us, dts, shift, positive, u_now, dt_now)
        advance(B, b_scale, C, c_scale, u_now, dt_now, dt_u, decay, skip, h, y)
        written = float32_at(out + 4 * (sequence * width + first), n)
        gate(z + sequence * z_apart + first if z else 0, zs, y, written)
        from_lanes(h, rank, n, state + offset)
    keep(low)
    keep(padded)
    keep(dt)
    keep(sums)


def selective_scan_step(
    x_proj: Tensor,
    dt_w_q: Tensor,
    dt_w_scale: Tensor,
    dt_proj_bias: Tensor | None,
    dt_scale: Tensor,
    u_q: Tensor,
    u_scale: Tensor,
    A: Tensor,
    D: Tensor | None,
    z_q: Tensor | None,
    z_scale: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    """As ssmc::selective_scan_step; the new state is written over `state` where that is float32."""
    linear = (dt_w_q, dt_w_scale, dt_proj_bias, dt_scale)
    rest = (*linear, u_q, u_scale, A, D, z_q, z_scale, dt_bias, state, softplus)
    if not _fits(dt_w_q, u_scale, z_q, z_scale, state):
        return run_torch(ops.selective_scan_step, x_proj, *rest)
    return _launch(x_proj, None, 0.0, *rest)


def normed_selective_scan_step(
    x_proj: Tensor,
    dt_norm: Tensor | None,
    B_norm: Tensor | None,
    C_norm: Tensor | None,
    eps: float,
    dt_w_q: Tensor,
    dt_w_scale: Tensor,
    dt_proj_bias: Tensor | None,
    dt_scale: Tensor,
    u_q: Tensor,
    u_scale: Tensor,
    A: Tensor,
    D: Tensor | None,
    z_q: Tensor | None,
    z_scale: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    """As ssmc::normed_selective_scan_step; states as in `selective_scan_step`."""
    linear, norms = (dt_w_q, dt_w_scale, dt_proj_bias, dt_scale), (dt_norm, B_norm, C_norm)
    rest = (*linear, u_q, u_scale, A, D, z_q, z_scale, dt_bias, state, softplus)
    if not _fits(dt_w_q, u_scale, z_q, z_scale, state):
        return run_torch(ops.normed_selective_scan_step, x_proj, *norms, eps, *rest)
    return _launch(x_proj, norms, eps, *rest)


def _fits(
    dt_w_q: Tensor, u_scale: Tensor, z_q: Tensor | None, z_scale: Tensor | None, state: Tensor
) -> bool:
    whole = dt_w_q.dtype == torch.int8 and state.is_contiguous()
    scaled = all(plain(scale, 1, state.shape[1]) for scale in (u_scale, z_scale))
    return whole and scaled and (z_q is None) == (z_scale is None)


def _launch(
    x_proj: Tensor,
    norms: tuple[Tensor | None, ...] | None,
    eps: float,
    dt_w_q: Tensor,
    dt_w_scale: Tensor,
    dt_proj_bias: Tensor | None,
    dt_scale: Tensor,
    u_q: Tensor,
    u_scale: Tensor,
    A: Tensor,
    D: Tensor | None,
    z_q: Tensor | None,
    z_scale: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    batch, width, rank = state.shape
    x, _, apart = rows(x_proj)
    u, _, u_apart = rows(u_q)
    z, _, z_apart = (None, 0, 0) if z_q is None else rows(z_q)
    y, new = empty((batch, 1, width)), widened(state)
    launch(
        _step, x, apart, dt_w_q.shape[1], int(norms is not None), *(norms or (None,) * 3),
        float(eps), contiguous(dt_w_q), vector(dt_w_scale, width), dt_proj_bias,
        vector(dt_scale, width), u, u_apart, vector(u_scale, width), contiguous(A), D, z, z_apart,
        vector(z_scale, width), dt_bias, new, y, batch, width, rank, int(softplus),
        work=4 * batch * width * rank,
    )  # fmt: skip
    return y, narrowed(new, state)
