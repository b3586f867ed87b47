"""Functions of float32 that loops over them vectorise: exponentials, and what is made of them.

They say what fastmath they allow, or they would be compiled with what their first caller allows.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ssmc.kernels.cpu import words
from ssmc.kernels.cpu.words import times_power

ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
LOG2E = np.float32(1.4426950408889634)
ROUND = np.float32(words.ROUND)
LOWEST, HIGHEST = np.float32(-126.0), np.float32(127.0)
# Taylor's series of 2^r: (ln 2)^k / k!, within 2e-8 of it for |r| <= 1/2.
SERIES = tuple(
    np.float32(c)
    for c in (
        0.69314718056, 0.24022650696, 0.055504108665, 0.0096181291076,
        0.0013333558146, 0.00015403530393, 0.000015252733804,
    )
)  # fmt: skip
_C1, _C2, _C3, _C4, _C5, _C6, _C7 = SERIES


@njit(fastmath={"contract"})
def exp2(x):
    """2^x for float32 x, which is taken to be within -126 to 127."""
    x = x if x > LOWEST else LOWEST
    x = x if x < HIGHEST else HIGHEST
    z = x + ROUND
    r = x - (z - ROUND)
    p = _C7 * r + _C6
    p = p * r + _C5
    p = p * r + _C4
    p = p * r + _C3
    p = p * r + _C2
    p = p * r + _C1
    return times_power(p * r + ONE, z)


@njit(fastmath={"contract"})
def silu(x):
    """x / (1 + exp(-x))."""
    return x / (ONE + exp2(-x * LOG2E))


# log(1 + t) / t for t in 0..1, of the least relative error (4e-7).
LOGARITHM = tuple(
    np.float32(c)
    for c in (
        0.999999806, -0.499974054, 0.332754797, -0.244954623,
        0.177452400, -0.107681692, 0.044089616, -0.008539204,
    )
)  # fmt: skip
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7 = LOGARITHM


@njit(fastmath={"contract"})
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


_QUARTER, _ROUND64 = 2 / np.pi, 6755399441055744.0  # 1.5 * 2^52: adding it leaves an integer
# Taylor's series around 0, of errors below 1e-9 for |r| <= pi/4.
_S3, _S5, _S7, _S9, _S11 = -1 / 6, 1 / 120, -1 / 5040, 1 / 362880, -1 / 39916800
_K2, _K4, _K6, _K8, _K10 = -1 / 2, 1 / 24, -1 / 720, 1 / 40320, -1 / 3628800


@njit(fastmath={"contract"})
def cos_sin(x):
    """Cosine and sine of a float32 of any size up to 2^31, to the last bit or the one before."""
    z = np.float64(x) * _QUARTER + _ROUND64
    turns = z - _ROUND64
    r = np.float64(x) - turns * (np.pi / 2)
    square = r * r
    sine = ((((_S11 * square + _S9) * square + _S7) * square + _S5) * square + _S3) * square
    sine = sine * r + r
    cosine = ((((_K10 * square + _K8) * square + _K6) * square + _K4) * square + _K2) * square + 1.0
    quarter = np.int64(turns) & 3
    first, second = (sine, cosine) if quarter & 1 else (cosine, sine)
    return (
        np.float32(-first if quarter == 1 or quarter == 2 else first),
        np.float32(-second if quarter >= 2 else second),
    )
