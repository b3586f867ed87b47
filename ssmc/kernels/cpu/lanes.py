"""Functions of `numbers` on registers of 16 float32, to the same bits, and what is made of them.

A loop over a few lanes spends more on asking whether its arrays overlap than on numbers. These ask
nothing: what they write may be what they read, and overlaps it in no other way.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ssmc.kernels.cpu import numbers
from ssmc.kernels.cpu.vectors import (
    FLOATS,
    WORDS,
    broadcast,
    integer,
    load,
    multiply_add,
    store,
    sums_of_lanes,
)
from ssmc.kernels.cpu.words import I8, I32, for_loop

LANES = 16
EXPONENT = ir.Constant(WORDS, [23] * LANES)  # where the bits of a float32 have it
MAGNITUDE = ir.Constant(WORDS, [0x7FFFFFFF] * LANES)


def every(value: Any) -> Any:
    """A number in all lanes."""
    return ir.Constant(FLOATS, [float(value)] * LANES)


def _series(builder: Any, coefficients: Any, x: Any) -> Any:
    """The sum of coefficients, the highest first, times powers of x."""
    first, *rest = coefficients
    p = every(first)
    for coefficient in rest:
        p = builder.call(multiply_add(builder), [p, x, every(coefficient)])
    return p


def exp2(builder: Any, x: Any) -> Any:
    """`numbers.exp2`."""
    for sign, bound in ((">", numbers.LOWEST), ("<", numbers.HIGHEST)):
        within = builder.fcmp_ordered(sign, x, every(bound))
        x = builder.select(within, x, every(bound))
    z = builder.fadd(x, every(numbers.ROUND))
    r = builder.fsub(x, builder.fsub(z, every(numbers.ROUND)))
    p = _series(builder, (*reversed(numbers.SERIES), numbers.ONE), r)
    power = builder.shl(builder.bitcast(z, WORDS), EXPONENT)
    return builder.bitcast(builder.add(builder.bitcast(p, WORDS), power), FLOATS)


def silu(builder: Any, x: Any) -> Any:
    """`numbers.silu`."""
    decay = exp2(builder, builder.fmul(builder.fneg(x), every(numbers.LOG2E)))
    return builder.fdiv(x, builder.fadd(every(numbers.ONE), decay))


def softplus(builder: Any, x: Any) -> Any:
    """`numbers.softplus`."""
    size = builder.bitcast(builder.and_(builder.bitcast(x, WORDS), MAGNITUDE), FLOATS)
    t = exp2(builder, builder.fmul(builder.fneg(size), every(numbers.LOG2E)))
    p = _series(builder, reversed(numbers.LOGARITHM), t)
    positive = builder.fcmp_ordered(">", x, every(numbers.ZERO))
    above = builder.select(positive, x, every(numbers.ZERO))
    return builder.call(multiply_add(builder), [p, t, above])


def bytes_at(builder: Any, address: Any) -> Any:
    """16 int8 as float32."""
    return builder.sitofp(load(builder, address, ir.VectorType(I8, LANES)), FLOATS)


def _blocks(builder: Any, count: Any, body: Any) -> None:
    """`body(index, 4 * 16 * index)` for blocks of 16 lanes."""

    def step(index: Any, _: list[Any]) -> list[Any]:
        body(builder.mul(index, integer(LANES)), builder.mul(index, integer(4 * LANES)))
        return []

    for_loop(builder, count, [], step)


@intrinsic
def dequantise(typing_context, out, q, scale, shift, blocks):
    """float32 at `out` = int8 at q times scale, plus shift, of 16 `blocks`."""

    def generate(context, builder, signature, arguments):
        out, q, scale, shift, blocks = arguments

        def body(index: Any, place: Any) -> None:
            operands = [bytes_at(builder, builder.add(q, index))]
            operands += [load(builder, builder.add(base, place), FLOATS) for base in (scale, shift)]
            value = builder.call(multiply_add(builder), operands)
            store(builder, value, builder.add(out, place))

        _blocks(builder, blocks, body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic
def widen(typing_context, out, q, blocks):
    """float32 at `out` = int8 at q, of 16 `blocks`."""

    def generate(context, builder, signature, arguments):
        out, q, blocks = arguments

        def body(index: Any, place: Any) -> None:
            store(builder, bytes_at(builder, builder.add(q, index)), builder.add(out, place))

        _blocks(builder, blocks, body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@intrinsic
def dequantise_token(typing_context, out, q, scale, blocks):
    """float32 at `out` = int8 at q times the one float32 at scale, of 16 `blocks`."""

    def generate(context, builder, signature, arguments):
        out, q, scale, blocks = arguments
        factor = broadcast(builder, scale)

        def body(index: Any, place: Any) -> None:
            values = bytes_at(builder, builder.add(q, index))
            store(builder, builder.fmul(values, factor), builder.add(out, place))

        _blocks(builder, blocks, body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def _in_place(function: Any) -> Any:
    """An intrinsic: a function of float32 at an address, in their place, of 16 `blocks`."""

    @intrinsic
    def in_place(typing_context, x, blocks):
        def generate(context, builder, signature, arguments):
            x, blocks = arguments

            def body(index: Any, place: Any) -> None:
                at = builder.add(x, place)
                store(builder, function(builder, load(builder, at, FLOATS)), at)

            _blocks(builder, blocks, body)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 2), generate

    return in_place


softplus_of = _in_place(softplus)
"""softplus of float32 at an address, in their place, of 16 `blocks`."""
silu_of = _in_place(silu)
"""SiLU of them."""


@intrinsic
def gated(typing_context, out, y, z, scale, blocks):
    """float32 at `out` = y times SiLU of int8 at z times scale, of 16 `blocks`."""

    def generate(context, builder, signature, arguments):
        out, y, z, scale, blocks = arguments

        def body(index: Any, place: Any) -> None:
            integers = bytes_at(builder, builder.add(z, index))
            factors, values = (
                load(builder, builder.add(base, place), FLOATS) for base in (scale, y)
            )
            value = builder.fmul(values, silu(builder, builder.fmul(integers, factors)))
            store(builder, value, builder.add(out, place))

        _blocks(builder, blocks, body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic
def recurrence(typing_context, h, decay, B, C, rank, dt, u, skip, y):
    """h = 2^(dt decay) h + dt u B for each state, y = C h + skip u; of 32 channels.

    h, decay float32 [rank, 32]; B, C [rank]; dt, u, skip, y [32], all at addresses.
    """

    def generate(context, builder, signature, arguments):
        h, decay, B, C, rank, dt, u, skip, y = arguments

        def at(base: Any) -> list[Any]:
            return [builder.add(base, integer(4 * LANES * i)) for i in range(2)]

        sizes, values, skips = (
            [load(builder, place, FLOATS) for place in at(base)] for base in (dt, u, skip)
        )
        updates = [builder.fmul(*pair) for pair in zip(sizes, values, strict=True)]
        direct = [builder.fmul(*pair) for pair in zip(skips, values, strict=True)]
        fused = multiply_add(builder)

        def step(index: Any, totals: list[Any]) -> list[Any]:
            single, row = builder.mul(index, integer(4)), builder.mul(index, integer(8 * LANES))
            b, c = (broadcast(builder, builder.add(base, single)) for base in (B, C))
            new, parts = [], (at(builder.add(decay, row)), at(builder.add(h, row)))
            for rate, place, size, update, total in zip(
                *parts, sizes, updates, totals, strict=True
            ):
                factor = exp2(builder, builder.fmul(size, load(builder, rate, FLOATS)))
                added = builder.fmul(update, b)
                state = builder.call(fused, [factor, load(builder, place, FLOATS), added])
                store(builder, state, place)
                new.append(builder.call(fused, [state, c, total]))
            return new

        for total, place in zip(for_loop(builder, rank, direct, step), at(y), strict=True):
            store(builder, total, place)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), generate


@intrinsic
def scaled_sums(typing_context, y, sums, excess, x_scale, w_scale, blocks):
    """float32 at y = (int32 at sums - excess) times x_scale, one float32, and w_scale; 16 `blocks`.

    In float64, and rounded once.
    """

    def generate(context, builder, signature, arguments):
        y, sums, excess, x_scale, w_scale, blocks = arguments
        wide = ir.VectorType(ir.DoubleType(), LANES)
        factor = builder.fpext(broadcast(builder, x_scale), wide)
        excess = builder.trunc(excess, I32)
        zero = ir.Constant(WORDS, [0] * LANES)
        single = builder.insert_element(zero, excess, ir.Constant(I32, 0))
        too_much = builder.shuffle_vector(single, single, zero)

        def body(index: Any, place: Any) -> None:
            total = builder.sub(load(builder, builder.add(sums, place), WORDS), too_much)
            scale = builder.fpext(load(builder, builder.add(w_scale, place), FLOATS), wide)
            value = builder.fmul(builder.sitofp(total, wide), builder.fmul(factor, scale))
            store(builder, builder.fptrunc(value, FLOATS), builder.add(y, place))

        _blocks(builder, blocks, body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@intrinsic
def scale_sums(typing_context, y, sums, scale, shift, blocks):
    """float32 at y = int32 at sums times float64 at scale, rounded, plus shift; of 16 `blocks`."""

    def generate(context, builder, signature, arguments):
        y, sums, scale, shift, blocks = arguments
        wide = ir.VectorType(ir.DoubleType(), LANES)

        def body(index: Any, place: Any) -> None:
            total = builder.sitofp(load(builder, builder.add(sums, place), WORDS), wide)
            factor = load(builder, builder.add(scale, builder.add(place, place)), wide)
            value = builder.fptrunc(builder.fmul(total, factor), FLOATS)
            value = builder.fadd(value, load(builder, builder.add(shift, place), FLOATS))
            store(builder, value, builder.add(y, place))

        _blocks(builder, blocks, body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic
def add_to(typing_context, y, x, blocks):
    """float32 at y += those at x, of 16 `blocks`."""

    def generate(context, builder, signature, arguments):
        y, x, blocks = arguments

        def body(index: Any, place: Any) -> None:
            at = builder.add(y, place)
            value = load(builder, builder.add(x, place), FLOATS)
            store(builder, builder.fadd(load(builder, at, FLOATS), value), at)

        _blocks(builder, blocks, body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@intrinsic
def add_product(typing_context, y, x, factor, blocks):
    """float32 at y += those at x times one float32, rounded once; of 16 `blocks`."""

    def generate(context, builder, signature, arguments):
        y, x, factor, blocks = arguments
        scale = broadcast(builder, factor)

        def body(index: Any, place: Any) -> None:
            value, total = (load(builder, builder.add(base, place), FLOATS) for base in (x, y))
            total = builder.call(multiply_add(builder), [value, scale, total])
            store(builder, total, builder.add(y, place))

        _blocks(builder, blocks, body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def rounded(builder: Any, x: Any, inverse: Any) -> Any:
    """`words.to_int8`."""
    value = builder.fmul(x, inverse)
    for sign, bound in (("<", 127.0), (">", -127.0)):
        within = builder.fcmp_ordered(sign, value, every(bound))
        value = builder.select(within, value, every(bound))
    bits = builder.bitcast(builder.fadd(value, every(numbers.ROUND)), WORDS)
    return builder.trunc(bits, ir.VectorType(I8, LANES))


@intrinsic
def round_to(typing_context, q, x, inverse, blocks):
    """int8 at q = float32 at x times inverse, one for each, rounded; of 16 `blocks`."""

    def generate(context, builder, signature, arguments):
        q, x, inverse, blocks = arguments

        def body(index: Any, place: Any) -> None:
            operands = [load(builder, builder.add(base, place), FLOATS) for base in (x, inverse)]
            store(builder, rounded(builder, *operands), builder.add(q, index))

        _blocks(builder, blocks, body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def channel_states(typing_context, h, A, blocks, B, C, dt, u, partial, count):
    """h = 2^(dt A log2 e) h + dt u B for `count` channels of 16 `blocks` states.

    h, A float32 [count, 16 blocks]; B, C [16 blocks]; dt, u [count], all at addresses. 16 sums of
    each channel's products with C go to partial float32 [count, 16].
    """

    def generate(context, builder, signature, arguments):
        h, A, blocks, B, C, dt, u, partial, count = arguments
        fused, zero = multiply_add(builder), every(0)

        def channel(index: Any, _: list[Any]) -> list[Any]:
            single, first = builder.mul(index, integer(4)), builder.mul(index, blocks)
            size, value = (broadcast(builder, builder.add(base, single)) for base in (dt, u))
            update = builder.fmul(size, value)

            def block(index: Any, totals: list[Any]) -> list[Any]:
                column = builder.mul(index, integer(4 * LANES))
                place = builder.add(builder.mul(first, integer(4 * LANES)), column)
                b, c = (load(builder, builder.add(base, column), FLOATS) for base in (B, C))
                rate = load(builder, builder.add(A, place), FLOATS)
                exponent = builder.fmul(size, builder.fmul(rate, every(numbers.LOG2E)))
                before = load(builder, builder.add(h, place), FLOATS)
                added = builder.fmul(update, b)
                state = builder.call(fused, [exp2(builder, exponent), before, added])
                store(builder, state, builder.add(h, place))
                return [builder.call(fused, [state, c, totals[0]])]

            (total,) = for_loop(builder, blocks, [zero], block)
            store(builder, total, builder.add(partial, builder.mul(index, integer(4 * LANES))))
            return []

        for_loop(builder, count, [], channel)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), generate


def _advance_rows(registers: int) -> Any:
    """An intrinsic that goes through rows of a state, of which it has `registers` blocks of 16."""

    @intrinsic
    def advance_rows(typing_context, h, apart, decay, update, B, C, partial, count):
        def generate(context, builder, signature, arguments):
            h, apart, decay, update, B, C, partial, count = arguments
            fused, offsets = multiply_add(builder), range(0, 4 * LANES * registers, 4 * LANES)
            factor = broadcast(builder, decay)
            bs, cs = (
                [load(builder, builder.add(base, integer(i)), FLOATS) for i in offsets]
                for base in (B, C)
            )

            def step(index: Any, _: list[Any]) -> list[Any]:
                row = builder.add(h, builder.mul(index, apart))
                value = broadcast(builder, builder.add(update, builder.mul(index, integer(4))))
                total_at = builder.add(partial, builder.mul(index, integer(4 * LANES)))
                total = load(builder, total_at, FLOATS)
                for offset, b, c in zip(offsets, bs, cs, strict=True):
                    place = builder.add(row, integer(offset))
                    kept = builder.fmul(factor, load(builder, place, FLOATS))
                    state = builder.call(fused, [value, b, kept])
                    store(builder, state, place)
                    total = builder.call(fused, [state, c, total])
                store(builder, total, total_at)
                return []

            for_loop(builder, count, [], step)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return advance_rows


advance_rows_128 = _advance_rows(8)
"""h = decay h + update B for `count` rows of 128 states; their products with C, not yet summed.

Rows of h are `apart` bytes apart; decay is one float32, update [count]; to partial float32
[count, 16] 16 sums of each row are added. All are addresses.
"""
advance_rows_16 = _advance_rows(1)
"""`advance_rows_128` of 16 states."""


@intrinsic
def sum_rows(typing_context, out, rows):
    """float32 [16] at `out`: the sums of 16 rows of 16, at an address."""

    def generate(context, builder, signature, arguments):
        out, rows = arguments
        places = [builder.add(rows, integer(4 * LANES * i)) for i in range(LANES)]
        values = [load(builder, place, FLOATS) for place in places]
        store(builder, sums_of_lanes(builder, builder.fadd, values), out)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 2), generate
