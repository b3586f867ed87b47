"""Functions of float32 that loops over them vectorise: exponentials, and what is made of them."""

from __future__ import annotations

import numpy as np
from numba import njit

from ssmc.kernels.cpu.words import ROUND, times_power

ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
LOG2E = np.float32(1.4426950408889634)
_ROUND = np.float32(ROUND)
_LOWEST, _HIGHEST = np.float32(-126.0), np.float32(127.0)
# Taylor's series of 2^r: (ln 2)^k / k!, within 2e-8 of it for |r| <= 1/2.
_C1, _C2, _C3, _C4, _C5, _C6, _C7 = (
    np.float32(c)
    for c in (
        0.69314718056, 0.24022650696, 0.055504108665, 0.0096181291076,
        0.0013333558146, 0.00015403530393, 0.000015252733804,
    )
)  # fmt: skip


@njit
def exp2(x):
    """2^x for float32 x, which is taken to be within -126 to 127."""
    x = x if x > _LOWEST else _LOWEST
    x = x if x < _HIGHEST else _HIGHEST
    z = x + _ROUND
    r = x - (z - _ROUND)
    p = _C7 * r + _C6
    p = p * r + _C5
    p = p * r + _C4
    p = p * r + _C3
    p = p * r + _C2
    p = p * r + _C1
    return times_power(p * r + ONE, z)


@njit
def silu(x):
    """x / (1 + exp(-x))."""
    return x / (ONE + exp2(-x * LOG2E))


# log(1 + t) / t for t in 0..1, of the least relative error (4e-7).
_L = tuple(
    np.float32(c)
    for c in (
        0.999999806, -0.499974054, 0.332754797, -0.244954623,
        0.177452400, -0.107681692, 0.044089616, -0.008539204,
    )
)  # fmt: skip
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7 = _L


@njit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)); relative error below 4e-7."""
    t = exp2(-abs(x) * LOG2E)
    p = _L7 * t + _L6
    p = p * t + _L5
    p = p * t + _L4
    p = p * t + _L3
    p = p * t + _L2
    p = p * t + _L1
    p = p * t + _L0
    return p * t + (x if x > ZERO else ZERO)
