"""What Numba has no words for: memory by address, bits of floats, atomics, calls by address.

Each is a few LLVM instructions put in place of the call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
F32 = ir.FloatType()
ROUND = 12582912.0  # 1.5 * 2^23: adding it leaves no fraction bits, half to even


def _word(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, I64.as_pointer())


# -- memory -----------------------------------------------------------------------------------


def _pointer(member: Any) -> Any:
    @intrinsic
    def pointer(typing_context, address):
        kind = types.CPointer(member)

        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(kind))

        return kind(types.int64), generate

    return pointer


_to_float32, _to_float64 = _pointer(types.float32), _pointer(types.float64)
_to_int8, _to_int16, _to_int32, _to_int64 = map(
    _pointer, (types.int8, types.int16, types.int32, types.int64)
)


@njit
def float32_at(address, count):
    """The array of `count` float32 at an address."""
    return carray(_to_float32(address), count)


@njit
def float64_at(address, count):
    """The array of `count` float64 at an address."""
    return carray(_to_float64(address), count)


@njit
def int8_at(address, count):
    """The array of `count` int8 at an address."""
    return carray(_to_int8(address), count)


@njit
def int16_at(address, count):
    """The array of `count` int16 at an address."""
    return carray(_to_int16(address), count)


@njit
def int32_at(address, count):
    """The array of `count` int32 at an address."""
    return carray(_to_int32(address), count)


@njit
def int64_at(address, count):
    """The array of `count` int64 at an address."""
    return carray(_to_int64(address), count)


@njit
def share(count, thread, threads):
    """The range of `count` things that is a thread's."""
    return range(count * thread // threads, count * (thread + 1) // threads)


LINE = 64  # bytes


@njit
def scratch(size):
    """Memory of `size` bytes, zeros, as an array, and the address in it where a cache line begins.

    What is made of addresses has no references to count, which would be atomic at each call.
    """
    memory = np.zeros(size + LINE, np.int8)
    return memory, (memory.ctypes.data + LINE - 1) // LINE * LINE


@njit
def keep(scratch):
    """Let an array live until here, of which only the address is used."""
    return len(scratch)


@intrinsic(prefer_literal=True)
def arguments_at(typing_context, address, count):
    """The `count` (a constant) int64 at an address, as a tuple."""
    kind = types.UniTuple(types.int64, count.literal_value)

    def generate(context, builder, signature, arguments):
        first = _word(builder, arguments[0])
        places = (builder.gep(first, [ir.Constant(I64, i)]) for i in range(kind.count))
        return context.make_tuple(builder, kind, [builder.load(place) for place in places])

    return kind(types.int64, count), generate


# -- numbers ----------------------------------------------------------------------------------


@intrinsic
def times_power(typing_context, y, z):
    """y * 2^n for the float32 z = n + ROUND and a normal result."""

    def generate(context, builder, signature, arguments):
        y, z = (builder.bitcast(value, I32) for value in arguments)
        return builder.bitcast(builder.add(y, builder.shl(z, ir.Constant(I32, 23))), F32)

    return types.float32(types.float32, types.float32), generate


@intrinsic
def _rounded(typing_context, x, inverse):

    def generate(context, builder, signature, arguments):
        value = builder.fmul(*arguments)
        for sign, bound in (("<", 127.0), (">", -127.0)):
            limit = ir.Constant(F32, bound)
            value = builder.select(builder.fcmp_ordered(sign, value, limit), value, limit)
        bits = builder.bitcast(builder.fadd(value, ir.Constant(F32, ROUND)), I32)
        return builder.trunc(bits, I8)

    return types.int8(types.float32, types.float32), generate


@njit
def to_int8(x, inverse):
    """`quantize_tensor` with the inverse scale given: clamp(round(x * inverse), -127, 127).

    A function of its own: in that of a kernel the product would be fused with what rounds it.
    """
    return _rounded(x, inverse)


@intrinsic
def scale_for(typing_context, absmax):
    """`ssmc.quant.formats.scale_for` for 8 bits: bf16_up(absmax / 127), at least 2^-126."""

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(builder.fdiv(arguments[0], ir.Constant(F32, 127.0)), I32)
        up = builder.and_(builder.add(bits, ir.Constant(I32, 0xFFFF)), ir.Constant(I32, -65536))
        scale, least = builder.bitcast(up, F32), ir.Constant(F32, 2.0**-126)
        return builder.select(builder.fcmp_ordered(">", scale, least), scale, least)

    return types.float32(types.float32), generate


@intrinsic
def float32_of_bits(typing_context, bits):
    """The float32 whose bits an int32 has."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], F32)

    return types.float32(types.int32), generate


@intrinsic
def bits_of_float32(typing_context, value):
    """The bits of a float32 as an int32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], I32)

    return types.int32(types.float32), generate


@intrinsic
def float_of_bits(typing_context, bits):
    """The float64 whose bits an int64 has."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), generate


# -- threads ----------------------------------------------------------------------------------


@intrinsic
def atomic_add(typing_context, address, value):
    """Add to the int64 at an address; what was there before."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", _word(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def atomic_swap(typing_context, address, value):
    """Put a value in place of the int64 at an address; what was there before."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("xchg", _word(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def atomic_load(typing_context, address):
    """The int64 at an address, and after it all that was written before it was."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(_word(builder, arguments[0]), "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def call_at(typing_context, function, arguments, thread, threads):
    """Call the kernel at an address."""
    kind = ir.FunctionType(ir.VoidType(), [I64, I64, I64])

    def generate(context, builder, signature, given):
        builder.call(builder.inttoptr(given[0], kind.as_pointer()), given[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def for_loop(builder: Any, count: Any, values: list[Any], body: Any) -> list[Any]:
    """IR of a loop `body(index, values) -> values`, `count` times; the last values."""
    before = builder.block
    head = builder.append_basic_block("head")
    inside = builder.append_basic_block("inside")
    after = builder.append_basic_block("after")
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(I64)
    index.add_incoming(ir.Constant(I64, 0), before)
    carried = [builder.phi(value.type) for value in values]
    for phi, value in zip(carried, values, strict=True):
        phi.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<", index, count), inside, after)
    builder.position_at_end(inside)
    new = body(index, carried)
    index.add_incoming(cgutils.increment_index(builder, index), builder.block)
    for phi, value in zip(carried, new, strict=True):
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return carried
