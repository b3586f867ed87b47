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


@triton.constexpr_function
def bundle_start(logs, index):
    """The number of the first piece of a bundle, by log2 of the pieces of each."""
    return sum(1 << log for log in logs[:index])


@triton.jit
def store_pieces(
    start,
    pieces,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    BUNDLES: tl.constexpr = None,
):
    """Write the pieces of N values to `start`.

    BUNDLES has log2 of the pieces of each bundle: its pieces have the first, second, ... places of
    runs that follow one another, instead of following one another themselves.
    """
    if BUNDLES is None:
        for i in tl.static_range((N + WIDTH - 1) // WIDTH):
            _store(start, pieces[i], i * WIDTH, N)
    else:
        for i in tl.static_range(len(BUNDLES)):
            _store_bundle(start, pieces, bundle_start(BUNDLES, i), BUNDLES[i], N, WIDTH)


@triton.jit
def _store_bundle(
    start,
    pieces,
    FIRST: tl.constexpr,
    LOG: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    x = ()
    for i in tl.static_range(FIRST, FIRST + (1 << LOG)):
        x = x + (pieces[i],)
    _store(start, turned(concatenated(x, LOG), LOG), FIRST * WIDTH, N)


@triton.jit
def _store(start, x, FIRST: tl.constexpr, N: tl.constexpr):
    columns = FIRST + tl.arange(0, x.numel)
    if FIRST + x.numel <= N:
        tl.store(start + columns, x)
    else:
        tl.store(start + columns, x, mask=columns < N)


@triton.jit
def products(x, y):
    """The products of two rows' values."""
    z = ()
    for i in tl.static_range(len(x)):
        z = z + (x[i] * y[i],)
    return z


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
def _sum_and_largest(sum_a, largest_a, sum_b, largest_b):
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
def sum_of(pieces):
    """The sum of a row."""
    total = pieces[0]
    for i in tl.static_range(1, len(pieces)):
        total += pieces[i]
    return tl.sum(total)


@triton.jit
def store_quantized(
    q_start,
    scale_start,
    pieces,
    factor,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    BUNDLES: tl.constexpr = None,
):
    """`quantize_dynamic` of factor > 0 times a row: its integers to q_start, its scale.

    BUNDLES as in `store_pieces`.
    """
    scale = scale_for(absmax_of(pieces) * factor)
    inverse = inverse_of(scale) * factor
    tl.store(scale_start, scale)
    q = ()
    for i in tl.static_range(len(pieces)):
        q = q + (to_int8_within(pieces[i], inverse),)
    store_pieces(q_start, q, N, WIDTH, BUNDLES)


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
def concatenated(x, LOG: tl.constexpr):
    """A tuple of 2^LOG tensors after one another in one; no thread gives a value away."""
    for _ in tl.static_range(LOG):
        pairs = ()
        for i in tl.static_range(len(x) // 2):
            both = tl.permute(tl.join(x[2 * i], x[2 * i + 1]), (1, 0))
            pairs = pairs + (tl.reshape(both, [both.numel]),)
        x = pairs
    return x[0]


@triton.jit
def pieces_of(x, LOG: tl.constexpr):
    """The inverse of `concatenated`."""
    y = (x,)
    for _ in tl.static_range(LOG):
        halves = ()
        for i in tl.static_range(len(y)):
            a, b = tl.split(tl.permute(tl.reshape(y[i], [2, y[i].numel // 2]), (1, 0)))
            halves = halves + (a, b)
        y = halves
    return y


@triton.jit
def turned(x, BITS: tl.constexpr):
    """x [2^k] with the bits of a value's place rotated to the left: the BITS high ones are low."""
    rows = tl.reshape(x, [1 << BITS, x.numel >> BITS])
    return tl.reshape(tl.permute(rows, (1, 0)), [x.numel])


def piece_width(n: int, num_warps: int) -> int:
    """The width of pieces of a row of n float32: 16 bytes a thread, or less for a short row."""
    return min(128 * num_warps, triton.next_power_of_2(n))
