"""Registers of 16 numbers, as LLVM's instructions: rows of them, sums over them, transposition."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ssmc.kernels.cpu.words import F32, I8, I32, I64, for_loop

ROWS = 16  # at a time: one for each number in a register
BYTES, WORDS = ir.VectorType(I8, 64), ir.VectorType(I32, 16)
FLOATS = ir.VectorType(F32, 16)


def load(builder: Any, address: Any, kind: Any) -> Any:
    """What lies at an address, whatever its alignment."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def store(builder: Any, value: Any, address: Any) -> None:
    """Put a value at an address, whatever its alignment."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def integer(value: int) -> Any:
    """A constant, as addresses and strides are."""
    return ir.Constant(I64, value)


def pairs(builder: Any, a: Any, b: Any, distance: int) -> tuple[Any, Any]:
    """Exchange the lanes of a and b whose numbers have, or have not, the bit `distance`."""
    upper = [j if not j & distance else 16 + j - distance for j in range(16)]
    lower = [j + distance if not j & distance else 16 + j for j in range(16)]
    masks = (ir.Constant(ir.VectorType(I32, 16), mask) for mask in (upper, lower))
    first, second = (builder.shuffle_vector(a, b, mask) for mask in masks)
    return first, second


def address_of_row(builder: Any, base: Any, stride: Any, row: int, rows: Any) -> Any:
    """The address of a row; of the last one for those behind it."""
    last = builder.sub(rows, integer(1))
    index = builder.select(builder.icmp_signed("<", integer(row), rows), integer(row), last)
    return builder.add(base, builder.mul(index, stride))


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """16 registers whose lanes are the numbers of the registers that their values come from."""
    rows = list(rows)
    for distance in (1, 2, 4, 8):
        for i in (i for i in range(ROWS) if not i & distance):
            rows[i], rows[i + distance] = pairs(builder, rows[i], rows[i + distance], distance)
    return rows


def sums_of_lanes(builder: Any, add: Any, rows: list[Any]) -> Any:
    """The sum over the lanes of each of 16 registers, as one register."""
    distance = 1
    while len(rows) > 1:  # neighbours become one, and their lanes half as many sums
        halves = zip(rows[::2], rows[1::2], strict=True)
        rows = [add(*pairs(builder, a, b, distance)) for a, b in halves]
        distance *= 2
    return rows[0]


@intrinsic
def transpose_block(typing_context, out, out_stride, x, x_stride):
    """16 rows of 16 words of 32 bits to 16 rows of such; strides are in bytes."""

    def generate(context, builder, signature, arguments):
        out, out_stride, x, stride = arguments
        places = [builder.add(x, builder.mul(stride, integer(i))) for i in range(ROWS)]
        columns = transposed(builder, [load(builder, place, WORDS) for place in places])
        for i, column in enumerate(columns):
            store(builder, column, builder.add(out, builder.mul(out_stride, integer(i))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def _widened(builder: Any, address: Any, kind: Any) -> Any:
    row = load(builder, address, ir.VectorType(kind, 16))
    return row if kind is F32 else builder.sitofp(row, FLOATS)


def _rows_dot(kind: Any, size: int) -> Any:
    """An intrinsic: products of rows of `kind`, a number of `size` bytes, with one of float32."""

    @intrinsic
    def rows_dot(typing_context, out, x, rows, stride, count, blocks):
        def generate(context, builder, signature, arguments):
            out, x, rows, stride, count, blocks = arguments
            bases = [address_of_row(builder, rows, stride, i, count) for i in range(ROWS)]
            fused = multiply_add(builder)

            def step(index: Any, totals: list[Any]) -> list[Any]:
                values = load(builder, builder.add(x, builder.mul(index, integer(64))), FLOATS)
                offset = builder.mul(index, integer(16 * size))
                new = []
                for base, total in zip(bases, totals, strict=True):
                    row = _widened(builder, builder.add(base, offset), kind)
                    new.append(builder.call(fused, [row, values, total]))
                return new

            zeros = ir.Constant(FLOATS, [0.0] * 16)
            totals = for_loop(builder, blocks, [zeros] * ROWS, step)
            store(builder, sums_of_lanes(builder, builder.fadd, totals), out)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return rows_dot


def multiply_add(builder: Any) -> Any:
    """The function of three registers that rounds a product and a sum once."""
    name, module = "llvm.fmuladd.v16f32", builder.module
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    return module.globals.get(name) or ir.Function(module, kind, name)


float32_rows_dot = _rows_dot(F32, 4)
"""float32 [16] at `out`: 16 rows of float32 times x float32 [16 blocks].

Rows are `stride` bytes apart; there are `count` of them, and what is behind these is not looked at.
"""
int8_rows_dot = _rows_dot(I8, 1)
"""`float32_rows_dot` of rows of int8."""


@intrinsic
def butterflies(typing_context, x, blocks):
    """The first four stages of a Walsh-Hadamard transform: each 16 of float32 [16 blocks]."""

    def generate(context, builder, signature, arguments):
        x, blocks = arguments
        fused = multiply_add(builder)

        def step(index: Any, _: list[Any]) -> list[Any]:
            place = builder.add(x, builder.mul(index, integer(64)))
            values = load(builder, place, FLOATS)
            for distance in (1, 2, 4, 8):
                mask = ir.Constant(WORDS, [i ^ distance for i in range(16)])
                signs = ir.Constant(FLOATS, [-1.0 if i & distance else 1.0 for i in range(16)])
                other = builder.shuffle_vector(values, values, mask)
                values = builder.call(fused, [values, signs, other])
            store(builder, values, place)
            return []

        for_loop(builder, blocks, [], step)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 2), generate


def _stages(count: int) -> Any:
    """An intrinsic: `count` further stages, of 2^count parts that are `apart` bytes each."""

    @intrinsic
    def stages(typing_context, x, apart, blocks):
        def generate(context, builder, signature, arguments):
            x, apart, blocks = arguments
            parts = [builder.add(x, builder.mul(apart, integer(i))) for i in range(1 << count)]

            def step(index: Any, _: list[Any]) -> list[Any]:
                offset = builder.mul(index, integer(64))
                places = [builder.add(part, offset) for part in parts]
                values = [load(builder, place, FLOATS) for place in places]
                for stage in range(count):
                    for i in (i for i in range(1 << count) if not i >> stage & 1):
                        a, b = values[i], values[i | 1 << stage]
                        values[i], values[i | 1 << stage] = builder.fadd(a, b), builder.fsub(a, b)
                for value, place in zip(values, places, strict=True):
                    store(builder, value, place)
                return []

            for_loop(builder, blocks, [], step)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), generate

    return stages


two_parts = _stages(1)
"""A stage of a Walsh-Hadamard transform: of 2 parts of float32 [16 blocks], `apart` bytes long."""
four_parts = _stages(2)
"""Two stages, of 4 such parts."""


def broadcast(builder: Any, address: Any) -> Any:
    """The float32 at an address in all lanes."""
    single = builder.bitcast(load(builder, address, F32), ir.VectorType(F32, 1))
    return builder.shuffle_vector(single, single, ir.Constant(WORDS, [0] * 16))


def _rows_sum(kind: Any, size: int, registers: int) -> Any:
    """An intrinsic: the sum of rows of `kind`, a number of `size` bytes, times float32 weights."""

    @intrinsic
    def rows_sum(typing_context, out, weights, rows, stride, count):
        def generate(context, builder, signature, arguments):
            out, weights, rows, stride, count = arguments
            fused = multiply_add(builder)

            def step(index: Any, totals: list[Any]) -> list[Any]:
                place = builder.add(weights, builder.mul(index, integer(4)))
                weight = broadcast(builder, place)
                row = builder.add(rows, builder.mul(index, stride))
                parts = (builder.add(row, integer(16 * size * i)) for i in range(registers))
                values = [_widened(builder, part, kind) for part in parts]
                pairs_of = zip(values, totals, strict=True)
                return [builder.call(fused, [value, weight, total]) for value, total in pairs_of]

            places = [builder.add(out, integer(64 * i)) for i in range(registers)]
            before = [load(builder, place, FLOATS) for place in places]
            for place, total in zip(places, for_loop(builder, count, before, step), strict=True):
                store(builder, total, place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return rows_sum


def _two_rows_sums(kind: Any, size: int) -> Any:
    """An intrinsic: `_rows_sum` of 64 columns with two kinds of weights."""

    @intrinsic
    def two_rows_sums(typing_context, out, apart, weights, weights_apart, rows, stride, count):
        def generate(context, builder, signature, arguments):
            out, apart, weights, weights_apart, rows, stride, count = arguments
            fused = multiply_add(builder)

            def step(index: Any, totals: list[Any]) -> list[Any]:
                row = builder.add(rows, builder.mul(index, stride))
                parts = (builder.add(row, integer(16 * size * i)) for i in range(4))
                values = [_widened(builder, part, kind) for part in parts]
                place, new = builder.add(weights, builder.mul(index, integer(4))), []
                for first in (0, 4):
                    weight = broadcast(builder, place)
                    pairs_of = zip(values, totals[first : first + 4], strict=True)
                    new += [builder.call(fused, [v, weight, total]) for v, total in pairs_of]
                    place = builder.add(place, weights_apart)
                return new

            places = [
                builder.add(base, integer(64 * i))
                for base in (out, builder.add(out, apart))
                for i in range(4)
            ]
            before = [load(builder, place, FLOATS) for place in places]
            for place, total in zip(places, for_loop(builder, count, before, step), strict=True):
                store(builder, total, place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return two_rows_sums


float32_rows_sum = _rows_sum(F32, 4, 1)
"""Add to float32 [16] at `out` 16 columns of `count` rows of float32 times their weights.

Rows are `stride` bytes apart, and are added in their order.
"""
float32_rows_sum_32 = _rows_sum(F32, 4, 2)
"""`float32_rows_sum` of 32 columns."""
float32_rows_sum_64 = _rows_sum(F32, 4, 4)
"""`float32_rows_sum` of 64 columns."""
float32_rows_sum_128 = _rows_sum(F32, 4, 8)
"""`float32_rows_sum` of 128 columns, as many as hide how long an addition takes."""
int8_rows_sum = _rows_sum(I8, 1, 1)
"""`float32_rows_sum` of rows of int8."""
int8_rows_sum_64 = _rows_sum(I8, 1, 4)
"""`int8_rows_sum` of 64 columns."""
float32_two_rows_sums = _two_rows_sums(F32, 4)
"""`float32_rows_sum_64` for two results, `apart` bytes apart, whose weights are so, too."""
int8_two_rows_sums = _two_rows_sums(I8, 1)
"""`float32_two_rows_sums` of rows of int8."""
