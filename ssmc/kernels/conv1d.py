"""Causal convolution of int8 along the length, and how its result is rounded again.

A program takes some channels and some positions one after the other. Four positions of a channel
are the bytes of one word, which an instruction multiplies by four taps at once: inputs are loaded
once and stay bytes. Sums of int8 products are integers below 2^22, so float32 holds them exactly.
"""

# A tuple of pieces grows in a loop that Triton unrolls; it knows no starred expressions.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels.arithmetic import inverse_of, scale_for, silu, to_int8, to_int8_within
from ssmc.kernels.launch import INTERPRETED, await_inputs, launch
from ssmc.kernels.tiles import processors
from ssmc.ops.conv import ACTIVATIONS, activate, check_conv

_INTERPRETED = tl.constexpr(INTERPRETED)
_FLOAT, _STATIC, _DYNAMIC = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
MAX_TAPS = 16
"""Most taps of a kernel, in which each has its registers; more are left to the operator."""


@triton.jit
def _words(a, b, c, d):
    """Four tensors of int8 as one of int32, `a` in the lowest byte."""
    if _INTERPRETED:
        low = (a.to(tl.int32) & 255) | ((b.to(tl.int32) & 255) << 8)
        word = low | ((c.to(tl.int32) & 255) << 16) | (d.to(tl.int32) << 24)
    else:
        word = tl.inline_asm_elementwise(
            """{
            .reg .b32 ab, cd;
            prmt.b32 ab, $4, $5, 0x5140;
            prmt.b32 cd, $6, $7, 0x5140;
            prmt.b32 $0, ab, cd, 0x5410;
            prmt.b32 $1, ab, cd, 0x7632;
            prmt.b32 ab, $4, $5, 0x7362;
            prmt.b32 cd, $6, $7, 0x7362;
            prmt.b32 $2, ab, cd, 0x5410;
            prmt.b32 $3, ab, cd, 0x7632;
            }""",
            "=&r,=&r,=&r,=&r,r,r,r,r",
            [a, b, c, d],
            dtype=tl.int32,
            is_pure=True,
            pack=4,
        )
    return word


@triton.jit
def _word_at(x, i: tl.constexpr):
    """Four tensors of the tuple x, from number i on, as `_words`."""
    return _words(x[i], x[i + 1], x[i + 2], x[i + 3])


@triton.jit
def _multiply(words, taps, total):
    """total + the sum of products of the four bytes of each word."""
    if _INTERPRETED:
        for i in tl.static_range(4):
            total += ((words << (24 - 8 * i)) >> 24) * ((taps << (24 - 8 * i)) >> 24)
    else:
        total = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [words, taps, total],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return total


@triton.jit
def _window(before, words, LAST: tl.constexpr):
    """The four bytes that end with byte LAST of `words`, which `before` precedes."""
    if LAST == 3:
        return words
    else:
        earlier = before.to(tl.uint32, bitcast=True) >> (8 * LAST + 8)
        return earlier.to(tl.int32, bitcast=True) | (words << (24 - 8 * LAST))


@triton.jit
def _load_taps(weight, channel, inside, TAPS: tl.constexpr, WORDS: tl.constexpr):
    """The weights [C, TAPS] of some channels, four [C, 4] at a time, the last ones first.

    Zeros stand in front.
    """
    taps = ()
    for i in tl.static_range(WORDS):
        tap = TAPS - 4 * (i + 1) + tl.arange(0, 4)
        mask = inside[:, None] & (tap >= 0)[None, :]
        at = weight + channel[:, None] * TAPS + tap[None, :]
        taps = taps + (tl.load(at, mask=mask, other=0),)
    return taps


@triton.jit
def _packed(taps, WORDS: tl.constexpr):
    """What `_load_taps` gives, each four as one word."""
    words = ()
    for i in tl.static_range(WORDS):
        shift = 8 * tl.arange(0, 4)
        words = words + (tl.sum((taps[i].to(tl.int32) & 255) << shift[None, :], 1),)
    return words


@triton.jit
def _load_input(
    x,
    x_stride,
    state,
    row,
    L,
    C,
    channel,
    inside,
    TAPS: tl.constexpr,
    BEFORE: tl.constexpr,
):
    """Input `row` of a sequence, which BEFORE says may be negative: then it is in the state."""
    if not BEFORE:
        return tl.load(
            x + tl.cast(row, tl.int64) * x_stride + channel, mask=inside & (row < L), other=0
        )
    else:
        at_hand = inside & (row >= 0) & (row < L)
        value = tl.load(x + tl.cast(row, tl.int64) * x_stride + channel, mask=at_hand, other=0)
        if state is not None:
            earlier = state + (row + TAPS - 1) * C + channel
            value += tl.load(earlier, mask=inside & (row < 0), other=0)
        return value


@triton.jit
def _convolve(  # noqa: C901
    x,
    x_stride,
    x_scale,
    weight,
    weight_scale,
    bias,
    state,
    new_state,
    channel,
    inside,
    L,
    C,
    y,
    y_stride,
    y_scale,
    y_scale_stride,
    X_STEP: tl.constexpr,
    W_STEP: tl.constexpr,
    Y_STEP: tl.constexpr,
    TAPS: tl.constexpr,
    WORDS: tl.constexpr,
    LENGTH: tl.constexpr,
    SILU: tl.constexpr,
    RESULT: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """LENGTH positions of one sequence; x, states and y point to its start.

    `y` points to the place of the first channel of a row of the result. RESULT says what becomes of
    it: float32; int8 with the static scales y_scale; int8 with a scale a position over the channels
    at hand, which is written to y_scale.
    """
    scale = tl.load(x_scale + channel * X_STEP, mask=inside, other=1.0)
    w_scale = tl.load(weight_scale + channel * W_STEP, mask=inside, other=1.0)
    if bias is not None:
        biases = tl.load(bias + channel, mask=inside, other=0.0)
    if RESULT == _STATIC:
        out_scale = tl.load(y_scale + channel * Y_STEP, mask=inside, other=1.0)
    loaded = _load_taps(weight, channel, inside, TAPS, WORDS)
    await_inputs(CHAIN)
    first = tl.program_id(1) * LENGTH
    none = tl.zeros([channel.shape[0]], tl.int8)
    inputs = ()
    for i in tl.static_range(4 * WORDS + (LENGTH + 3) // 4 * 4):
        row = first + i - 4 * WORDS
        if i > 4 * WORDS - TAPS and i < 4 * WORDS + LENGTH:
            q = _load_input(x, x_stride, state, row, L, C, channel, inside, TAPS, i < 4 * WORDS)
            inputs = inputs + (q,)
        else:
            inputs = inputs + (none,)
    # What is made of constants comes after the loads of inputs: it waits for loads of its own.
    scale *= w_scale
    if RESULT == _STATIC:
        inverse = inverse_of(out_scale)
    taps = _packed(loaded, WORDS)
    words = ()
    for i in tl.static_range(0, 4 * WORDS, 4):
        words = words + (_word_at(inputs, i),)
    for i in tl.static_range(LENGTH):
        if i % 4 == 0:
            words = words + (_word_at(inputs, i + 4 * WORDS),)
        # The sum of products stands in the low bits of 1.5 * 2^23.
        total = tl.full([channel.shape[0]], 0x4B400000, tl.int32)
        for k in tl.static_range(WORDS):
            four = _window(words[WORDS + i // 4 - k - 1], words[WORDS + i // 4 - k], i % 4)
            total = _multiply(four, taps[k], total)
        total = total.to(tl.float32, bitcast=True) - 12582912.0
        value = total * scale
        if bias is not None:
            value += biases
        if SILU:
            value = silu(value)
        row = first + i
        out = y + tl.cast(row, tl.int64) * y_stride + channel
        mask = inside & (row < L)
        if RESULT == _FLOAT:
            tl.store(out, value, mask=mask)
        if RESULT == _STATIC:
            tl.store(out, to_int8(value, inverse), mask=mask)
        if RESULT == _DYNAMIC:
            value = tl.where(inside, value, 0.0)
            row_scale = scale_for(tl.max(tl.abs(value)))
            tl.store(out, to_int8_within(value, inverse_of(row_scale)), mask=mask)
            tl.store(y_scale + tl.cast(row, tl.int64) * y_scale_stride, row_scale, mask=row < L)
    if first + LENGTH >= L:
        for i in tl.static_range(TAPS - 1):
            row = L + i - (TAPS - 1)
            q = _load_input(x, x_stride, state, row, L, C, channel, inside, TAPS, True)
            tl.store(new_state + i * C + channel, q, mask=inside)


@triton.jit
def _kernel(
    x,
    x_batch,
    x_stride,
    x_scale,
    weight,
    weight_scale,
    bias,
    state,
    new_state,
    L,
    C,
    y,
    y_scale,
    U,
    b,
    b_scale,
    c,
    c_scale,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    X_STEP: tl.constexpr,
    W_STEP: tl.constexpr,
    Y_STEP: tl.constexpr,
    TAPS: tl.constexpr,
    WORDS: tl.constexpr,
    SILU: tl.constexpr,
    STATIC: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """Channels 0 to U in blocks; then, where there are GROUPS, a program a group of b and c."""
    block = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    x += batch * x_batch
    new_state += batch * (TAPS - 1) * C
    if state is not None:
        state += batch * (TAPS - 1) * C
    group = block - tl.cdiv(U, BLOCK_C)
    if group < 0:
        channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
        y += batch * L * U
        _convolve(
            x, x_stride, x_scale, weight, weight_scale, bias, state, new_state,
            channel, channel < U, L, C, y, U, y_scale, 0,
            X_STEP, W_STEP, Y_STEP, TAPS, WORDS, LENGTH, SILU,
            _STATIC if STATIC else _FLOAT, CHAIN,
        )  # fmt: skip
    elif GROUPS > 0:
        place = tl.arange(0, BLOCK_G)
        member = U + group * GROUP_SIZE + place
        part = b
        part_scale = b_scale
        if group >= GROUPS:
            part = c
            part_scale = c_scale
        # Back from the channel of x to the place in the group's own row.
        number = group % GROUPS
        part += batch * L * GROUPS * GROUP_SIZE + number * GROUP_SIZE - (U + group * GROUP_SIZE)
        part_scale += batch * L * GROUPS + number
        _convolve(
            x, x_stride, x_scale, weight, weight_scale, bias, state, new_state,
            member, place < GROUP_SIZE, L, C, part, GROUPS * GROUP_SIZE, part_scale, GROUPS,
            X_STEP, W_STEP, 0, TAPS, WORDS, LENGTH, SILU, _DYNAMIC, CHAIN,
        )  # fmt: skip


class Tiling(NamedTuple):
    """What a program does: channels and positions, with so many warps; None to choose."""

    block_c: int | None = None
    positions: int | None = None
    num_warps: int | None = None


def _run(
    op: str,
    operands: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    activation: str,
    y: Tensor,
    y_scale: Tensor | None,
    groups: tuple[Tensor, ...],
    tiling: Tiling,
) -> Tensor:
    """Fill y, and `groups` (B, its scale, C, its scale, or nothing); return the new state."""
    x_q, x_scale, w_q, w_scale, bias, state_q = operands
    check_conv(op, x_q, w_q, bias, state_q)
    if activation not in ACTIVATIONS:
        activate(y, activation)  # raises
    x_q = x_q if x_q.stride(2) == 1 else x_q.contiguous()
    batch, length, channels = x_q.shape
    taps = w_q.shape[1]
    new_state = torch.empty((batch, taps - 1, channels), dtype=torch.int8, device=x_q.device)
    number, size = groups[0].shape[2:] if groups else (0, 1)
    width = channels - 2 * number * size
    block_c = tiling.block_c or min(256, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, block_c) + 2 * number
    positions = tiling.positions or _positions(blocks * batch, length, processors(x_q.device))
    positions = min(positions, triton.next_power_of_2(length))
    launch(
        _kernel,
        (blocks, triton.cdiv(length, positions), batch),
        x_q,
        x_q.stride(0),
        x_q.stride(1),
        x_scale.contiguous(),
        w_q.contiguous(),
        w_scale.contiguous(),
        bias,
        None if state_q is None else state_q.contiguous(),
        new_state,
        length,
        channels,
        y,
        None if y_scale is None else y_scale.contiguous(),
        width,
        *(groups or (None, None, None, None)),
        device=x_q.device,
        GROUPS=number,
        GROUP_SIZE=size,
        X_STEP=_step(x_scale),
        W_STEP=_step(w_scale),
        Y_STEP=0 if y_scale is None else _step(y_scale),
        TAPS=taps,
        WORDS=triton.cdiv(taps, 4),
        SILU=activation == "silu",
        STATIC=y_scale is not None,
        LENGTH=positions,
        BLOCK_C=block_c,
        BLOCK_G=triton.next_power_of_2(size),
        num_warps=tiling.num_warps or max(1, block_c // 128),
    )
    return new_state


def _positions(blocks: int, length: int, count: int) -> int:
    """Positions a program: as many as leave each of `count` processors 16 programs, 4 to 16.

    Many load fewer inputs twice; with few a short prompt is done sooner.
    """
    positions = 16
    while positions > 4 and blocks * triton.cdiv(length, positions) < 16 * count:
        positions //= 2
    return positions


def _step(scale: Tensor) -> int:
    """The distance from the scale of a channel to the next: 0 where all share one."""
    return 0 if scale.numel() == 1 else 1


def int8_causal_conv1d(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    state_q: Tensor | None = None,
    activation: str = "none",
    *,
    block_c: int | None = None,
    positions: int | None = None,
    num_warps: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Kernel of `ssmc.ops.int8_causal_conv1d`; its own definition runs for more than 16 taps."""
    operands = (x_q, x_scale, w_q, w_scale, bias, state_q)
    if w_q.shape[1] > MAX_TAPS:
        return torch.ops.ssmc.int8_causal_conv1d(*operands, activation)
    y = torch.empty(x_q.shape, device=x_q.device)
    tiling = Tiling(block_c, positions, num_warps)
    return y, _run("int8_causal_conv1d", operands, activation, y, None, (), tiling)


def int8_causal_conv1d_quantize(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    state_q: Tensor | None,
    activation: str,
    out_scale: Tensor,
    *,
    block_c: int | None = None,
    positions: int | None = None,
    num_warps: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Kernel of `ssmc.ops.int8_causal_conv1d_quantize`; over 16 taps its definition runs."""
    operands = (x_q, x_scale, w_q, w_scale, bias, state_q)
    if w_q.shape[1] > MAX_TAPS:
        return torch.ops.ssmc.int8_causal_conv1d_quantize(*operands, activation, out_scale)
    u_q = torch.empty(x_q.shape, dtype=torch.int8, device=x_q.device)
    tiling = Tiling(block_c, positions, num_warps)
    op = "int8_causal_conv1d_quantize"
    return u_q, _run(op, operands, activation, u_q, out_scale, (), tiling)


def int8_causal_conv1d_split(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    state_q: Tensor | None,
    activation: str,
    out_scale: Tensor,
    groups: int,
    *,
    block_c: int | None = None,
    positions: int | None = None,
    num_warps: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Kernel of `ssmc.ops.int8_causal_conv1d_split`; over 16 taps its definition runs."""
    operands = (x_q, x_scale, w_q, w_scale, bias, state_q)
    if w_q.shape[1] > MAX_TAPS:
        return torch.ops.ssmc.int8_causal_conv1d_split(*operands, activation, out_scale, groups)
    batch, length, channels = x_q.shape
    size = (channels - out_scale.numel()) // (2 * groups)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((batch, length, *shape), dtype=dtype, device=x_q.device)

    u_q = empty(*out_scale.shape, dtype=torch.int8)
    parts = tuple(
        empty(groups, width, dtype=dtype)
        for width, dtype in ((size, torch.int8), (1, torch.float32)) * 2
    )
    tiling = Tiling(block_c, positions, num_warps)
    op = "int8_causal_conv1d_split"
    new_state = _run(op, operands, activation, u_q, out_scale, parts, tiling)
    return u_q, parts[0], parts[1], parts[2], parts[3], new_state
