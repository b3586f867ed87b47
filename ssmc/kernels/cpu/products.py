"""Products of int8 values in registers, as LLVM's instructions: tiles of them, and packing.

One step multiplies 64 pairs of bytes, the first without a sign, and adds four by four to 16 int32:
the instruction vpdpbusd where the processor has it. Weights are read as w + 128, so that sums hold
128 times the sum of x too much.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ssmc.kernels.cpu import has_vnni
from ssmc.kernels.cpu.vectors import (
    BYTES,
    ROWS,
    WORDS,
    address_of_row,
    integer,
    load,
    store,
    sums_of_lanes,
    transposed,
)
from ssmc.kernels.cpu.words import I8, I32, for_loop

TILE_X, TILE_W = 8, 3  # a tile is 8 rows of x by 3 times ROWS of the weight
_RAISE = ir.Constant(BYTES, [-128] * 64)
_ZEROS = ir.Constant(WORDS, [0] * 16)
QUARTER = ir.VectorType(I8, 16)


def _dot(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """total [16] + the sums of four products each of unsigned [64] and signed [64]."""
    if has_vnni():
        kind = ir.FunctionType(WORDS, [WORDS, BYTES, BYTES])
        name = "llvm.x86.avx512.vpdpbusd.512"
        module = builder.module
        function = module.globals.get(name) or ir.Function(module, kind, name)
        return builder.call(function, [total, unsigned, signed])
    wide = ir.VectorType(ir.IntType(16), 64)
    products = builder.mul(builder.zext(unsigned, wide), builder.sext(signed, wide))
    for lane in range(4):
        mask = ir.Constant(ir.VectorType(I32, 16), [4 * i + lane for i in range(16)])
        part = builder.shuffle_vector(products, products, mask)
        total = builder.add(total, builder.sext(part, WORDS))
    return total


def _broadcast(builder: Any, address: Any) -> Any:
    """Four bytes, 16 times."""
    one = ir.Constant(ir.VectorType(I32, 16), ir.Undefined)
    single = builder.insert_element(one, load(builder, address, I32), ir.Constant(I32, 0))
    word = builder.shuffle_vector(single, single, _ZEROS)
    return builder.bitcast(word, BYTES)


@intrinsic
def tile_product(typing_context, out, x, x_stride, x_rows, packed, steps):
    """int32 [TILE_X, 16 TILE_W] at `out`: x int8 [8, 4 steps] times a packed weight of 48 rows.

    Rows of x are `x_stride` bytes apart; there are `x_rows` of them, and what is behind these is
    not to be looked at. The sums are 128 times the sum of a row of x too large.
    """

    def generate(context, builder, signature, arguments):
        out, x, stride, rows, packed, steps = arguments
        bases = [address_of_row(builder, x, stride, i, rows) for i in range(TILE_X)]

        def step(index: Any, totals: list[Any]) -> list[Any]:
            w = builder.add(packed, builder.mul(index, integer(64 * TILE_W)))
            weights = [load(builder, builder.add(w, integer(64 * i)), BYTES) for i in range(TILE_W)]
            offset, new = builder.mul(index, integer(4)), []
            for row, base in enumerate(bases):
                word = _broadcast(builder, builder.add(base, offset))
                for i, weight in enumerate(weights):
                    new.append(_dot(builder, totals[row * TILE_W + i], weight, word))
            return new

        totals = for_loop(builder, steps, [_ZEROS] * (TILE_X * TILE_W), step)
        for i, total in enumerate(totals):
            store(builder, total, builder.add(out, integer(64 * i)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@intrinsic
def pack_rows(typing_context, out, out_stride, w, w_stride, w_rows, blocks):
    """Rows of a weight as `tile_product` reads them: 16 blocks of 4 columns each, raised by 128.

    16 rows of 64 `blocks` bytes, `w_stride` apart, of which `w_rows` count. Four columns of the 16
    are 64 bytes, `out_stride` apart.
    """

    def generate(context, builder, signature, arguments):
        out, out_stride, w, stride, rows, blocks = arguments
        bases = [address_of_row(builder, w, stride, i, rows) for i in range(ROWS)]

        def step(index: Any, _: list[Any]) -> list[Any]:
            offset = builder.mul(index, integer(64))
            block = [load(builder, builder.add(base, offset), BYTES) for base in bases]
            words = [builder.bitcast(builder.xor(b, _RAISE), WORDS) for b in block]
            first = builder.mul(index, integer(ROWS))
            for i, word in enumerate(transposed(builder, words)):
                place = builder.mul(builder.add(first, integer(i)), out_stride)
                store(builder, word, builder.add(out, place))
            return []

        for_loop(builder, blocks, [], step)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@intrinsic
def rows_product(typing_context, out, x, w, w_stride, w_rows, blocks):
    """int32 [16] at `out`: 16 rows of a weight times x int8 [64 blocks]; exact.

    Rows are `w_stride` bytes apart; there are `w_rows` of them, and what is behind these is not to
    be looked at.
    """

    def generate(context, builder, signature, arguments):
        out, x, w, stride, rows, blocks = arguments
        bases = [address_of_row(builder, w, stride, i, rows) for i in range(ROWS)]

        def step(index: Any, totals: list[Any]) -> list[Any]:
            offset = builder.mul(index, integer(64))
            values = load(builder, builder.add(x, offset), BYTES)
            new = []
            for base, total in zip(bases, totals, strict=False):
                row = load(builder, builder.add(base, offset), BYTES)
                new.append(_dot(builder, total, builder.xor(row, _RAISE), values))
            return [*new, _dot(builder, totals[-1], _RAISE, values)]

        *totals, excess = for_loop(builder, blocks, [_ZEROS] * (ROWS + 1), step)
        sums = [builder.sub(total, excess) for total in totals]
        store(builder, sums_of_lanes(builder, builder.add, sums), out)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


TAPS = 4  # of a convolution, the bytes of a word


@intrinsic
def slide(typing_context, sums, window, x, taps, blocks):
    """int32 at `sums` = four taps of channels times the last four values of each, of 16 `blocks`.

    A word of `window` has the values of a channel raised by 128, the oldest first; that at x, an
    int8, comes in, and the oldest goes. A word of `taps` has four int8.
    """

    def generate(context, builder, signature, arguments):
        sums, window, x, taps, blocks = arguments
        eight, high = (ir.Constant(WORDS, [bits] * 16) for bits in (8, 24))

        def step(index: Any, _: list[Any]) -> list[Any]:
            place = builder.mul(index, integer(64))
            at = builder.add(window, place)
            narrow = load(builder, builder.add(x, builder.mul(index, integer(16))), QUARTER)
            new = builder.shl(builder.zext(narrow, WORDS), high)
            new = builder.xor(new, ir.Constant(WORDS, [1 << 31] * 16))
            values = builder.or_(builder.lshr(load(builder, at, WORDS), eight), new)
            store(builder, values, at)
            factors = load(builder, builder.add(taps, place), BYTES)
            excess = builder.sub(_ZEROS, _dot(builder, _ZEROS, _RAISE, factors))
            total = _dot(builder, excess, builder.bitcast(values, BYTES), factors)
            store(builder, total, builder.add(sums, place))
            return []

        for_loop(builder, blocks, [], step)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate
