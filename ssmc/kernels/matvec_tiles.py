"""Parts of the matrix-vector kernels: a weight held in registers times a row packed in words.

A row of K int8 values is cut into parts (`parts_of`), each a tuple entry of its own, and so is the
weight's tile of BLOCK_N rows. A part of S columns is a tensor of int32 words [S / PER_WORD /
COLUMNS, BLOCK_N, COLUMNS], four int8 columns a word or eight of 4 bits: the first dimension lies in
a thread's registers, and a warp holds whole rows as long as COLUMNS is at most 128, so that sums
over K need no shared memory.
"""

# Tuples of pieces grow in loops that Triton unrolls; it knows no starred expressions.
# ruff: noqa: RUF005, SIM108
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ssmc.errors import UsageError
from ssmc.kernels.arithmetic import inverse_of, scale_for, times_scale, to_int8_within
from ssmc.kernels.launch import INTERPRETED
from ssmc.kernels.pieces import stack

_INTERPRETED = tl.constexpr(INTERPRETED)
_EIGHTS = tl.constexpr(-0x07070708)  # four bytes of -8


def parts_of(width: int, smallest: int, most: int = 3) -> tuple[int, ...]:
    """At most `most` powers of two, the larger first, whose sum is the least that holds `width`.

    What a row is cut into, as the shapes of tensors in kernels are powers of two: 5,120 is 4,096
    and 1,024. All are multiples of `smallest`, itself a power of two, or UsageError; only the last
    may reach beyond the width.
    """
    if smallest < 1 or smallest & (smallest - 1) or width < 1:
        raise UsageError(f"cannot cut a width of {width} into multiples of {smallest}")
    parts: list[int] = []
    rest = width
    while rest > 0:
        part = 1 << (rest.bit_length() - 1)
        if part < rest and (len(parts) == most - 1 or part < smallest):
            part *= 2
        parts.append(max(part, smallest))
        rest -= parts[-1]
    return tuple(parts)


@triton.constexpr_function
def start_of(parts, index):
    """Where part `index` of a row begins."""
    return sum(parts[:index])


@triton.constexpr_function
def log2(n):
    """The exponent of a power of two."""
    return n.bit_length() - 1


@triton.jit
def dot4(a, b, c):
    """c + the sum of the products of the four int8 values in the words a and b; all int32."""
    if _INTERPRETED:
        for byte in tl.static_range(4):
            c += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
        return c
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _load_part(
    words_ptr,
    n,
    RUNS: tl.constexpr,
    STRIDE: tl.constexpr,
    COUNT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """COUNT words of the rows n [BLOCK_N] as [RUNS, BLOCK_N, COLUMNS].

    Loaded in two dimensions, since versions of Triton differ in which of three they give to warps.
    """
    rows: tl.constexpr = n.numel
    row = tl.reshape(tl.broadcast_to(n[None, :], [RUNS, rows]), [RUNS * rows])
    word = (tl.arange(0, RUNS * rows) // rows * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    at = words_ptr + row.to(tl.int64)[:, None] * STRIDE + word
    if RUNS * COLUMNS > COUNT:
        part = tl.load(at, mask=word < COUNT, other=0)
    else:
        part = tl.load(at)
    return tl.reshape(part, [RUNS, rows, COLUMNS])


@triton.jit
def load_weight(
    words_ptr,
    n,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    PER_WORD: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The weight's rows n [BLOCK_N] of WIDTH columns, PER_WORD of them an int32 word."""
    weight = ()
    for p in tl.static_range(len(PARTS)):
        weight = weight + (
            _load_part(
                words_ptr + start_of(PARTS, p) // PER_WORD,
                n,
                PARTS[p] // PER_WORD // COLUMNS,
                WIDTH // PER_WORD,
                min(PARTS[p], WIDTH - start_of(PARTS, p)) // PER_WORD,
                COLUMNS,
            ),
        )
    return weight


@triton.jit
def load_group_scales(
    scale_ptr,
    n,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The scales of the groups of a weight of 4 bits, in the order of its words' sums."""
    scales = ()
    for p in tl.static_range(len(PARTS)):
        first = start_of(PARTS, p) // GROUP
        run = tl.arange(0, PARTS[p] // 8 // COLUMNS)
        within = tl.arange(0, COLUMNS * 8 // GROUP)
        group = first + run[:, None, None] * (COLUMNS * 8 // GROUP) + within[None, None, :]
        at = scale_ptr + n.to(tl.int64)[None, :, None] * (WIDTH // GROUP) + group
        scales = scales + (tl.load(at, mask=group < WIDTH // GROUP, other=0.0),)
    return scales


@triton.jit
def load_bias(bias, n):
    """The bias of rows n, or zero where there is none."""
    if bias is None:
        return 0.0
    else:
        return tl.load(bias + n)


@triton.jit
def load_residual(residual, residual_stride, row, n):
    """What is added to the products of rows n, or zero where there is nothing."""
    if residual is None:
        return 0.0
    else:
        return tl.load(residual + row * residual_stride + n)


@triton.jit
def joined(pieces, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """pieces[FIRST], ..., COUNT of them a power of two, zeros if missing: [n, COUNT]."""
    chosen = ()
    for i in tl.static_range(FIRST, FIRST + COUNT):
        if i < len(pieces):
            chosen = chosen + (pieces[i],)
        else:
            chosen = chosen + (tl.zeros_like(pieces[0]),)
    return tl.reshape(stack(chosen, log2(COUNT)), [pieces[0].shape[0], COUNT])


@triton.jit
def _word(even, odd):
    """Words of int8 values: even [..., 2] holds their first and third, odd the others."""
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    low = (first.to(tl.int32) & 255) | ((second.to(tl.int32) & 255) << 8)
    return low | ((third.to(tl.int32) & 255) << 16) | (fourth.to(tl.int32) << 24)


@triton.jit
def _in_order(words):
    """words [places, pieces] as one row, the places of a piece after one another.

    A gather: where threads need copies of the row, each loads them from shared memory. Of a mere
    transposition the compiler may instead repeat all the arithmetic that led to the words.
    """
    places: tl.constexpr = words.shape[0]
    pieces: tl.constexpr = words.shape[1]
    index = tl.arange(0, words.numel)
    return tl.gather(tl.reshape(words, [words.numel]), index % places * pieces + index // places, 0)


@triton.jit
def packed(q):
    """int8 [n] as int32 words [n / 4], the first value in the lowest byte."""
    even, odd = tl.split(tl.reshape(q, [q.numel // 4, 2, 2]))
    return _word(even, odd)


@triton.jit
def load_words(base, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """The words of a row of WIDTH int8 values at `base` (words), in parts; zeros beyond."""
    loaded = ()
    for p in tl.static_range(len(PARTS)):
        word = start_of(PARTS, p) // 4 + tl.arange(0, PARTS[p] // 4)
        if start_of(PARTS, p) + PARTS[p] > WIDTH:
            loaded = loaded + (tl.load(base + word, mask=word < WIDTH // 4, other=0),)
        else:
            loaded = loaded + (tl.load(base + word),)
    words = ()
    for p in tl.static_range(len(PARTS)):  # when all are on their way
        words = words + (tl.gather(loaded[p], tl.arange(0, PARTS[p] // 4), 0),)
    return words


@triton.jit
def quantized(pieces, largest, PARTS: tl.constexpr):
    """`quantize_dynamic` of a float row in pieces of one width: (its words in parts, its scale).

    `largest` is the row's largest magnitude. Every part is a multiple of the pieces' width.
    """
    width: tl.constexpr = pieces[0].shape[0]
    scale = scale_for(largest)
    inverse = inverse_of(scale)
    in_pieces = ()
    for i in tl.static_range(len(pieces)):
        in_pieces = in_pieces + (packed(to_int8_within(pieces[i], inverse)),)
    words = ()
    for p in tl.static_range(len(PARTS)):
        part = joined(in_pieces, start_of(PARTS, p) // width, PARTS[p] // width)
        words = words + (_in_order(part),)
    return words, scale


@triton.jit
def _int8_sums(weight, words):
    """int32 [BLOCK_N, COLUMNS]: products of one part, summed over what a thread holds."""
    runs: tl.constexpr = weight.shape[0]
    columns: tl.constexpr = weight.shape[2]
    x = tl.broadcast_to(tl.reshape(words, [runs, 1, columns]), weight.shape)
    return tl.sum(dot4(weight, x, tl.zeros_like(weight)), 0)


@triton.jit
def _int4_sums(weight, scales, words, GROUP: tl.constexpr):
    """float32 [BLOCK_N, groups]: products of one part, scaled group by group.

    A group's first half of words holds the columns of the low four bits, the second those of the
    high ones. The bits are the value plus 8, so each word of x begins with -8 times its sum.
    """
    runs: tl.constexpr = weight.shape[0]
    rows: tl.constexpr = weight.shape[1]
    columns: tl.constexpr = weight.shape[2]
    length: tl.constexpr = GROUP // 8
    halves = tl.reshape(words, [runs * columns // length, 2, length])
    low, high = tl.split(tl.permute(halves, [0, 2, 1]))
    low, high = tl.reshape(low, [runs, 1, columns]), tl.reshape(high, [runs, 1, columns])
    eights = tl.full([runs, 1, columns], _EIGHTS, tl.int32)
    offset = dot4(high, eights, dot4(low, eights, tl.zeros_like(low)))
    low = tl.broadcast_to(low, weight.shape)
    high = tl.broadcast_to(high, weight.shape)
    offset = tl.broadcast_to(offset, weight.shape)
    sums = dot4(weight & 0x0F0F0F0F, low, offset)
    sums = dot4((weight >> 4) & 0x0F0F0F0F, high, sums)
    groups: tl.constexpr = columns // length
    sums = tl.sum(tl.reshape(sums, [runs, rows, groups, length]), 3)
    return tl.sum(sums.to(tl.float32) * scales, 0)


@triton.jit
def _one_a_thread(sums):
    """The same sums [BLOCK_N], no longer each in all the threads of a warp.

    What follows, and what it is combined with, then takes a fraction of registers and instructions.
    """
    return tl.gather(sums, tl.arange(0, sums.numel), 0)


@triton.jit
def product(weight, scales, words, x_scale, GROUP: tl.constexpr):
    """float32 [BLOCK_N]: the weight times the row of words, with all scales applied.

    `scales` [BLOCK_N] where GROUP is 0, int8 weights; else the tuple of `load_group_scales`.
    """
    if GROUP == 0:
        sums = _int8_sums(weight[0], words[0])
        for p in tl.static_range(1, len(weight)):
            sums += _int8_sums(weight[p], words[p])
        return times_scale(_one_a_thread(tl.sum(sums, 1)), x_scale * scales)
    else:
        total = _int4_sums(weight[0], scales[0], words[0], GROUP)
        for p in tl.static_range(1, len(weight)):
            total += _int4_sums(weight[p], scales[p], words[p], GROUP)
        return _one_a_thread(tl.sum(total, 1)) * x_scale
