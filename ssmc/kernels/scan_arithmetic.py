"""What the selective scan computes for one position and channel: step size, gate, scaled int8."""

from __future__ import annotations

import triton
import triton.language as tl

from ssmc.kernels.arithmetic import LOG2E


@triton.jit
def scaled(q, scale):
    """q * scale of int8 q and a scale of 8 significant bits, by two operations and exact.

    The byte q + 128 as last bits of 2^23 makes 2^23 + 128 + q, which the fused operation scales
    and takes the first part off; 2^23 + 128 times the scale has 24 bits.
    """
    pattern = q.to(tl.uint8, bitcast=True).to(tl.int32) ^ 0x4B000080
    return tl.fma(pattern.to(tl.float32, bitcast=True), scale, scale * -8388736.0)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log1p(t), t = exp(-|x|); relative error below 4e-7.

    log1p(t) / t for t in 0..1 is the polynomial of the least relative error: no division.
    """
    t = tl.exp2(tl.abs(x) * -LOG2E)
    p = tl.fma(t, -0.008539204, 0.044089616)
    p = tl.fma(t, p, -0.107681692)
    p = tl.fma(t, p, 0.177452400)
    p = tl.fma(t, p, -0.244954623)
    p = tl.fma(t, p, 0.332754797)
    p = tl.fma(t, p, -0.499974054)
    p = tl.fma(t, p, 0.999999806)
    return tl.fma(t, p, tl.maximum(x, 0.0))


@triton.jit
def silu(x):
    """x / (1 + exp(-x)) to a few units in the last place; the division is a squared rsqrt."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))
    return x * (root * root)


@triton.jit
def parameter(pointer, stride, channel, width):
    """A parameter a channel (stride 1) or of all (stride 0); zeros where there is none."""
    if pointer is not None:
        value = tl.load(pointer + channel * stride, mask=channel < width, other=1.0)
    else:
        value = (channel * 0).to(tl.float32)
    return value
