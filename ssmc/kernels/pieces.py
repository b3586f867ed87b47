"""A row in registers: a tuple of *pieces*, tensors of one width, a power of two.

They follow one another in the row. So a row of 5,120 is 10 pieces of 512, and no register holds
padding up to 8,192; what works along the row's high bits works on whole tensors.
"""

# A tuple of pieces grows in a loop that Triton unrolls; it knows no starred expressions.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ssmc.kernels.arithmetic import inverse_of, inverse_rms, scale_for, to_int8_within


@triton.jit
def load_piece(
    start,
    i: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Piece i of N contiguous values from `start` on; zeros where it goes beyond."""
    columns = i * WIDTH + tl.arange(0, WIDTH)
    if i * WIDTH + WIDTH <= N:
        return tl.load(start + columns)
    else:
        return tl.load(start + columns, mask=columns < N, other=0)


@triton.jit
def load_pieces(start, N: tl.constexpr, WIDTH: tl.constexpr):
    """N contiguous values from `start` on, as pieces."""
    pieces = ()
    for i in tl.static_range((N + WIDTH - 1) // WIDTH):
        pieces = pieces + (load_piece(start, i, N, WIDTH),)
    return pieces


@triton.jit
def store_pieces(start, pieces, N: tl.constexpr, WIDTH: tl.constexpr):
    """Write the pieces of N values to `start`."""
    for i in tl.static_range((N + WIDTH - 1) // WIDTH):
        columns = i * WIDTH + tl.arange(0, WIDTH)
        if i * WIDTH + WIDTH <= N:
            tl.store(start + columns, pieces[i])
        else:
            tl.store(start + columns, pieces[i], mask=columns < N)


@triton.jit
def largest_of(pieces):
    """The largest magnitude at each place of the pieces."""
    largest = tl.abs(pieces[0])
    for i in tl.static_range(1, len(pieces)):
        largest = tl.maximum(largest, tl.abs(pieces[i]))
    return largest


@triton.jit
def absmax_of(pieces):
    """The largest magnitude of a row."""
    return tl.max(largest_of(pieces))


@triton.jit
def _sum_and_largest(sum_a, largest_a, sum_b, largest_b):  # noqa: ANN202
    return sum_a + sum_b, tl.maximum(largest_a, largest_b)


@triton.jit
def normed(x, weights, eps, K: tl.constexpr):
    """`rms_norm` of a row in pieces, and its largest magnitude.

    `weights` are those of the norm, if any. Without them the largest magnitude is the row's times a
    factor, as rounding keeps the order: threads then meet once for both.
    """
    squares = x[0] * x[0]
    for i in tl.static_range(1, len(x)):
        squares += x[i] * x[i]
    y = ()
    if len(weights) == 0:
        total, largest = tl.reduce((squares, largest_of(x)), 0, _sum_and_largest)
        inverse = inverse_rms(total, K, eps)
        for i in tl.static_range(len(x)):
            y = y + (x[i] * inverse,)
        return y, largest * inverse
    else:
        inverse = inverse_rms(tl.sum(squares), K, eps)
        for i in tl.static_range(len(x)):
            y = y + (x[i] * inverse * weights[i],)
        return y, absmax_of(y)


@triton.jit
def store_quantized(
    q_start,
    scale_start,
    pieces,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """`quantize_dynamic` of a row: its integers to q_start, its scale to scale_start."""
    scale = scale_for(absmax_of(pieces))
    inverse = inverse_of(scale)
    tl.store(scale_start, scale)
    q = ()
    for i in tl.static_range(len(pieces)):
        q = q + (to_int8_within(pieces[i], inverse),)
    store_pieces(q_start, q, N, WIDTH)


@triton.jit
def stack(x, STEPS: tl.constexpr):
    """A tuple of 2^STEPS tensors as one, in which their values of one place are neighbours."""
    for _ in tl.static_range(STEPS):
        pairs = ()
        for i in tl.static_range(len(x) // 2):
            both = tl.join(x[i], x[i + len(x) // 2])
            pairs = pairs + (tl.reshape(both, [both.shape[0] * 2]),)
        x = pairs
    return x[0]


@triton.jit
def unstack(x, STEPS: tl.constexpr):
    """The inverse of `stack`."""
    y = (x,)
    for _ in tl.static_range(STEPS):
        low = ()
        high = ()
        for i in tl.static_range(len(y)):
            a, b = tl.split(tl.reshape(y[i], [y[i].shape[0] // 2, 2]))
            low = low + (a,)
            high = high + (b,)
        y = low + high
    return y


def piece_width(n: int, num_warps: int) -> int:
    """The width of pieces of a row of n float32: 16 bytes a thread, or less for a short row."""
    return min(128 * num_warps, triton.next_power_of_2(n))
