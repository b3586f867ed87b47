"""A step of Mamba's scan and what is in front of it: norms, rounding and dt_proj, in one kernel.

Each thread does the norms and the rounding of a token, which are little, for itself.
"""

from __future__ import annotations

import torch
from numba import njit
from torch import Tensor

from ssmc import ops
from ssmc.kernels.cpu.kernel import kernel
from ssmc.kernels.cpu.lanes import channel_states, sum_rows
from ssmc.kernels.cpu.launch import (
    contiguous,
    empty,
    launch,
    narrowed,
    rows,
    run_torch,
    vector,
    widened,
)
from ssmc.kernels.cpu.linear import column_parameters, copy_rows, finish
from ssmc.kernels.cpu.norm import normalise
from ssmc.kernels.cpu.products import rows_product
from ssmc.kernels.cpu.quantize import quantize_row
from ssmc.kernels.cpu.selective_scan import (
    ROW,
    SIZES,
    SKIP,
    STATES,
    WIDTH,
    U,
    Y,
    advance,
    begin,
    begin_states,
    from_lanes,
    inputs,
    of_token,
    plain,
    room_for,
    write,
)
from ssmc.kernels.cpu.vectors import ROWS
from ssmc.kernels.cpu.words import (
    arguments_at,
    float32_at,
    float_of_bits,
    int8_at,
    keep,
    scratch,
    share,
)

PRODUCTS = 4 * ROWS * (1 + 4)  # bytes: sums of 16 channels, and what finishes them


@njit
def _round(x, n, normed, weight, eps, room, q):
    """Round float32 [n] at an address, or its norm, to q; the scale."""
    values, rounded = float32_at(x, n), int8_at(q, n)
    if normed:
        y = float32_at(room, n)
        normalise(values, weight, eps, y)
        return quantize_row(y, rounded)
    return quantize_row(values, rounded)


@njit
def _step_sizes(low, scale, w, w_scale, bias, out_scale, rank, first, n, width, room, out):
    """dt_proj of n channels from `first` on, rounded; low int8 [64 blocks] and its scale.

    room: PRODUCTS bytes, then 16 such rows as low.
    """
    blocks = (rank + 63) // 64
    columns, copied, wide = room + 4 * ROWS, room + PRODUCTS, blocks * 64
    for start in range(first, first + n, ROWS):
        count, source, apart = min(ROWS, first + n - start), w + start * rank, rank
        if (start + count - 1) * rank + wide > width * rank:  # it would be read beyond its end
            copy_rows(source, rank, count, rank, copied, wide)
            source, apart = copied, wide
        rows_product(room, low, source, apart, count, blocks)
        shifts = bias + 4 * start if bias else 0
        column_parameters(w_scale + 4 * start, shifts, out_scale + 4 * start, count, ROWS, columns)
        finish(room, 0, scale, bias, 0, 1, count, ROWS, columns, out + start - first)


@njit
def _advance(rows, A, state, scales, rank, n, positive, room):
    """A position of n channels; `rows` and `scales` are those of `advance`.

    A channel's states are lanes, as they are in memory, and are summed at the end.
    """
    u, dt, z, B, C, out = rows
    b, c, partial = room + STATES, room + STATES + 4 * rank, room + STATES + 8 * rank
    inputs(u, 0, dt, 0, 1, n, positive, room)
    of_token(B, scales[0], rank, b)
    of_token(C, scales[1], rank, c)
    y, skip = float32_at(room + Y, n), float32_at(room + SKIP, n)
    values = float32_at(room + U, n)
    for first in range(0, n, ROWS):
        count, place = min(ROWS, n - first), 4 * first
        states, rates = state + place * rank, A + place * rank
        sizes, us = room + SIZES + place, room + U + place
        channel_states(states, rates, rank // ROWS, b, c, sizes, us, partial, count)
        sum_rows(room + Y + place, partial)
    for i in range(n):
        y[i] += skip[i] * values[i]
    write(room + Y, z, n, room, out)


@kernel()
def _step(arguments, thread, threads):
    (
        x, apart, low_n, normed, dt_norm, B_norm, C_norm, eps, w, w_scale, bias, dt_scale, u,
        u_apart, u_scale, A, D, z, z_apart, z_scale, dt_bias, state, out, batch, width, rank,
        positive,
    ) = arguments_at(arguments, 27)  # fmt: skip
    blocks, wide, least = (width + WIDTH - 1) // WIDTH, (low_n + 63) // 64 * 64, float_of_bits(eps)
    longest = max(low_n, rank)
    memory, room = scratch(room_for(rank) + ROW + PRODUCTS + (ROWS + 1) * wide + 6 * longest + 64)
    # Step sizes and three scales; what they are made of; sums of these products; norms; B and C.
    dt = (room + room_for(rank) + 63) // 64 * 64
    low, products = dt + ROW, dt + ROW + wide
    normed_room = products + PRODUCTS + ROWS * wide
    B, segment_scales = normed_room + 4 * longest, float32_at(dt + WIDTH, 3)
    C = B + rank
    done = -1
    for unit in share(batch * blocks, thread, threads):
        sequence, first = unit // blocks, unit % blocks * WIDTH
        n, offset = min(WIDTH, width - first), 4 * (sequence * width + first) * rank
        if sequence != done:
            row = x + 4 * sequence * apart
            segment_scales[0] = _round(row, low_n, normed, dt_norm, least, normed_room, low)
            row += 4 * low_n
            segment_scales[1] = _round(row, rank, normed, B_norm, least, normed_room, B)
            row += 4 * rank
            segment_scales[2] = _round(row, rank, normed, C_norm, least, normed_room, C)
            done = sequence
        _step_sizes(
            low, dt + WIDTH, w, w_scale, bias, dt_scale, low_n, first, n, width, products, dt
        )
        begin((u_scale, dt_scale, z_scale, D, dt_bias), first, n, room)
        places = (
            u + sequence * u_apart + first, dt, z + sequence * z_apart + first if z else 0, B, C,
            out + 4 * (sequence * width + first),
        )  # fmt: skip
        token_scales, rates = (dt + WIDTH + 4, dt + WIDTH + 8), A + 4 * first * rank
        if rank % ROWS:
            begin_states(rates, state + offset, n, rank, room)
            advance(places, (0,) * 6, token_scales, 0, rank, 1, n, positive, room)
            from_lanes(room + STATES, rank, n, state + offset)
        else:
            _advance(places, rates, state + offset, token_scales, rank, n, positive, room)
    keep(memory)


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
