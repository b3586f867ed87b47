"""One position of a causal convolution, as the kernels of decoding make it behind their product."""

# Tuples of pieces grow in loops that Triton unrolls; it knows no starred expressions.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ssmc.kernels.arithmetic import inverse_of, silu, times_scale, to_int8


@triton.jit
def load_taps(w, scale, scale_step, bias, c, inside, TAPS: tl.constexpr):
    """What channels c of the convolution know before: weights, their scale, bias."""
    weights = ()
    for k in tl.static_range(TAPS):
        weights = weights + (tl.load(w + c * TAPS + k, mask=inside, other=0),)
    scale = tl.load(scale + c * scale_step, mask=inside, other=1.0)
    if bias is None:
        return weights, scale, 0.0
    else:
        return weights, scale, tl.load(bias + c, mask=inside, other=0.0)


@triton.jit
def load_history(state, c, inside, C, TAPS: tl.constexpr):
    """The last inputs of channels c, the oldest first."""
    history = ()
    for k in tl.static_range(TAPS - 1):
        history = history + (tl.load(state + k * C + c, mask=inside, other=0),)
    return history


@triton.jit
def conv_step(
    q,
    x_scale,
    history,
    taps,
    state,
    u_scale,
    u_q,
    y,
    c,
    inside,
    C,
    U,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
):
    """One position of channels c of a sequence: store the result and the history, moved on."""
    inputs = history + (q,)
    weights, scale, bias = taps
    total = inputs[0].to(tl.int32) * weights[0].to(tl.int32)
    for k in tl.static_range(1, TAPS):
        total += inputs[k].to(tl.int32) * weights[k].to(tl.int32)
    result = times_scale(total, scale * x_scale) + bias
    if SILU:
        result = silu(result)
    tl.store(u_q + c, to_int8(result, inverse_of(u_scale)), mask=inside & (c < U))
    tl.store(y + c - U, result, mask=inside & (c >= U))
    # Threads that hold copies of a channel have read its history before one of them changes it.
    tl.debug_barrier()
    for k in tl.static_range(TAPS - 1):
        tl.store(state + k * C + c, inputs[k + 1], mask=inside)
