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
_TINY = tl.constexpr(1.1754943508222875e-38)  # smallest normal float32


@triton.jit
def rint(x):
    """The integer nearest to x, half to even, for |x| < 2^22; float32."""
    return (x + _ROUND) - _ROUND


@triton.jit
def to_int8(x, inverse):
    """`quantize_tensor` with the inverse scale given: clamp(rint(x * inverse), -127, 127)."""
    limited = tl.minimum(tl.maximum(x * inverse, -127.0), 127.0)
    # The sum's low bits are the integer: no conversion, which would go through a slow unit.
    return (limited + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def inverse_of(scale):
    """1 / scale, correctly rounded."""
    return tl.math.div_rn(scale * 0.0 + 1.0, scale)


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
def silu(x):
    """x / (1 + exp(-x)) to a few units in the last place, without a division."""
    if _INTERPRETED:
        return x / (1.0 + tl.exp(-x))
    power = tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -LOG2E], tl.float32, is_pure=True, pack=1
    )
    inverse = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], tl.float32, is_pure=True, pack=1
    )
    return x * inverse


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to a few units in the last place, also where it is tiny.

    max(x, 0) + log1p(t) with t = exp(-|x|), and log1p(t) = 2 artanh(s), s = t / (2 + t) <= 1/3,
    by its series: the logarithm of 1 + t would lose what of t is below the last place of 1.
    """
    t = tl.exp(-tl.abs(x))
    s = t / (2.0 + t)
    q = s * s
    p = 2.0 / 15 * q + 2.0 / 13
    p = p * q + 2.0 / 11
    p = p * q + 2.0 / 9
    p = p * q + 2.0 / 7
    p = p * q + 2.0 / 5
    p = p * q + 2.0 / 3
    p = p * q + 2.0
    return tl.maximum(x, 0.0) + s * p
