"""Quantised arithmetic inside kernels: the same definitions as `ssmc.quant.formats`, bit for bit.

Launched through `ssmc.kernels.launch`, no multiplication is contracted with an addition.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssmc.kernels.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no fraction bits, half to even
_ROUND_BITS = tl.constexpr(0x4B400000)
_TINY = tl.constexpr(1.1754943508222875e-38)  # smallest normal float32


@triton.jit
def to_int8(x, inverse):
    """`quantize_tensor` with the inverse scale given: clamp(round(x * inverse), -127, 127)."""
    limited = tl.minimum(tl.maximum(x * inverse, -127.0), 127.0)
    # The sum's low bits are the integer: no conversion, which would go through a slow unit.
    return (limited + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def inverse_of(scale):
    """1 / scale, correctly rounded."""
    return tl.math.div_rn(scale * 0.0 + 1.0, scale)


@triton.jit
def inverse_rms(total, N: tl.constexpr, eps):
    """1 / sqrt(total / N + eps), every step correctly rounded."""
    mean = tl.math.div_rn(total, total * 0.0 + N)
    return tl.math.div_rn(total * 0.0 + 1.0, tl.math.sqrt_rn(mean + eps))


@triton.jit
def scale_for(absmax):
    """`ssmc.quant.formats.scale_for` for 8 bits: bf16_up(absmax / 127), at least 2^-126."""
    pattern = tl.math.div_rn(absmax, absmax * 0.0 + 127.0).to(tl.int32, bitcast=True)
    rounded = ((pattern + 0xFFFF) & -65536).to(tl.float32, bitcast=True)
    return tl.maximum(rounded, _TINY)


@triton.jit
def times_scale(accumulator, scale):
    """float32(accumulator * scale) of an int32 sum and a scale of 16 bits, rounded once.

    Above 2^24 an int32 has no float32, so its low byte is multiplied apart: that product is exact,
    and the fused one adds the rest without rounding in between. The interpreter does not fuse.
    """
    if _INTERPRETED:
        return (accumulator.to(tl.float64) * scale.to(tl.float64)).to(tl.float32)
    low = accumulator & 255
    high = (accumulator - low).to(tl.float32)
    return tl.fma(high, scale, low.to(tl.float32) * scale)


@triton.jit
def to_int8_within(x, inverse):
    """`to_int8` of x with |x * inverse| <= 127, as under a scale for the largest |x|."""
    return (x * inverse + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def to_float(i):
    """An integer |i| < 2^22 as float32, without the slow conversion unit."""
    return (i.to(tl.int32) + _ROUND_BITS).to(tl.float32, bitcast=True) - _ROUND


@triton.jit
def scaled(q, scale):
    """q * scale of int8 q and a scale of 8 significant bits, by two operations and exact.

    The byte q + 128 as last bits of 2^23 makes 2^23 + 128 + q, which the fused operation scales
    and takes the first part off; 2^23 + 128 times the scale has 24 bits. The interpreter does not
    fuse.
    """
    if _INTERPRETED:
        return q.to(tl.float32) * scale
    pattern = q.to(tl.uint8, bitcast=True).to(tl.int32) ^ 0x4B000080
    return tl.fma(pattern.to(tl.float32, bitcast=True), scale, scale * -8388736.0)


@triton.jit
def silu(x):
    """x / (1 + exp(-x)) to a few units in the last place; the division is a squared rsqrt."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))
    return x * (root * root)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log1p(t), t = exp(-|x|); relative error below 4e-7.

    log1p(t) / t for t in 0..1 is the polynomial of the least relative error: no division, and no
    logarithm, which would lose what of t is below the last place of 1.
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
def parameter(pointer, stride, channel, width):
    """A parameter a channel (stride 1) or of all (stride 0); zeros where there is none."""
    if pointer is not None:
        value = tl.load(pointer + channel * stride, mask=channel < width, other=1.0)
    else:
        value = (channel * 0).to(tl.float32)
    return value
