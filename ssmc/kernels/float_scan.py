"""The selective scan on floats: for calibration, and schemes whose activations stay in 16 bits.

A program holds the states of some channels of one sequence and takes token after token, as the
definition does. It is bound by the latency of that chain, some hundred ns a token, which does not
matter where there are many channels and sequences, and by memory elsewhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels.arithmetic import LOG2E, parameter, silu
from ssmc.kernels.arithmetic import softplus as softplus_of
from ssmc.kernels.launch import await_inputs, launch

CHANNELS = 32
"""Of a program, which is one warp: a lane has a channel and all its states."""


@triton.jit
def _kernel(
    u,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    old_state,
    y,
    new_state,
    length,
    width,
    states,
    u_batch,
    u_row,
    dt_batch,
    dt_row,
    B_batch,
    B_row,
    C_batch,
    C_row,
    z_batch,
    z_row,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """BLOCK_D channels of one sequence, a token at a time."""
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    batch = tl.program_id(1).to(tl.int64)
    state = tl.arange(0, N)
    mine, known = channel < width, state < states
    inside = mine[None, :] & known[:, None]
    cell = channel[None, :] * states + state[:, None]
    rate = tl.load(A + cell, mask=inside, other=0.0) * LOG2E
    skip = parameter(D, 1, channel, width)
    bias = parameter(dt_bias, 1, channel, width)
    await_inputs(CHAIN)

    cell += batch * width * states
    if old_state is not None:
        h = tl.load(old_state + cell, mask=inside, other=0.0)
    else:
        h = tl.zeros((N, BLOCK_D), tl.float32)
    for step in tl.range(0, length, num_stages=4):
        at = batch * 0 + (length - 1 - step if REVERSE else step)  # int64: rows may be far apart
        x = tl.load(u + batch * u_batch + at * u_row + channel, mask=mine, other=0.0)
        size = tl.load(dt + batch * dt_batch + at * dt_row + channel, mask=mine, other=0.0) + bias
        if SOFTPLUS:
            size = softplus_of(size)
        b = tl.load(B + batch * B_batch + at * B_row + state, mask=known, other=0.0)
        c = tl.load(C + batch * C_batch + at * C_row + state, mask=known, other=0.0)
        h = tl.fma(tl.exp2(size[None, :] * rate), h, (size * x)[None, :] * b[:, None])
        out = tl.sum(h * c[:, None], 0)
        if D is not None:
            out += skip * x
        if z is not None:
            out *= silu(tl.load(z + batch * z_batch + at * z_row + channel, mask=mine, other=0.0))
        tl.store(y + (batch * length + at) * width + channel, out, mask=mine)
    tl.store(new_state + cell, h, mask=inside)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state: Tensor | None = None,
    softplus: bool = True,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """`ssmc.ops.selective_scan` on a GPU; u, dt, B, C and z may be views of wider rows."""
    batch, length, width = u.shape
    states = A.shape[1]
    u, dt, B, C = (_adjoining(x) for x in (u, dt, B, C))
    z = None if z is None else _adjoining(z)
    state = None if state is None else state.contiguous()
    y = torch.empty((batch, length, width), dtype=torch.float32, device=u.device)
    new_state = torch.empty((batch, width, states), dtype=torch.float32, device=u.device)
    rows = [stride for x in (u, dt, B, C) for stride in x.stride()[:2]]
    launch(
        _kernel,
        (triton.cdiv(width, CHANNELS), batch),
        *(u, dt, A.contiguous(), B, C, D, z, dt_bias, state, y, new_state),
        *(length, width, states, *rows, *((0, 0) if z is None else z.stride()[:2])),
        device=u.device,
        SOFTPLUS=softplus,
        REVERSE=reverse,
        N=triton.next_power_of_2(states),
        BLOCK_D=CHANNELS,
        num_warps=1,
    )
    return y, new_state


def _adjoining(x: Tensor) -> Tensor:
    """x with neighbouring channels."""
    return x if x.stride(-1) == 1 else x.contiguous()
