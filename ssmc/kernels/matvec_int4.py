"""Decoding's linear layers with a weight of 4 bits, held in shared memory, in Gluon.

A program for each multiprocessor. Before it does anything else it asks the copy engine for all its
rows of the weight, and they arrive while the kernels in front are at work. Registers have no room
for that: those of a weight of 4 bits are taken by what it is unpacked to and by its scales.
"""

# A tuple that grows in a loop has a type for Triton alone.
# mypy: disable-error-code="misc,unreachable,var-annotated"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ssmc.kernels.arithmetic import inverse_of, scale_for, to_int8, to_int8_within
from ssmc.kernels.conv_step import conv_step, load_history, load_taps
from ssmc.kernels.launch import await_inputs, can_chain, let_next_load
from ssmc.kernels.matvec_tiles import dot4, load_bias, load_residual
from ssmc.kernels.pieces import normed
from ssmc.kernels.tiles import processors

PIECE = 128
"""Words of a row that one instruction of a warp reads."""
ROOM = 144 * 1024
"""Most bytes of the weight that a program holds: of the 227 KB that a multiprocessor has, the rest
is for the next kernel's."""
LEAST_ROWS = 4
"""Fewest rows a program has: fewer are spread better by the kernels without shared memory."""
MANY_ROWS = 32
"""From here on a program has eight warps instead of four."""
_EIGHTS = gl.constexpr(-0x07070708)  # four bytes of -8


@dataclass(frozen=True)
class Held:
    """How a weight [N, width] is divided: `chunks` times `warps` rows a program, one a warp.

    `group` columns of a row share a scale; in shared memory a row has `pieces` pieces of words.
    """

    width: int
    group: int
    pieces: int
    chunks: int
    warps: int

    @property
    def rows(self) -> int:
        """Rows of the weight that a program multiplies."""
        return self.chunks * self.warps

    @property
    def bytes(self) -> int:
        """Shared memory that these take."""
        return self.rows * self.pieces * PIECE * 4

    def constants(self) -> dict[str, Any]:
        """What the kernels take beside operands and sizes, by name."""
        return {
            "K": self.width,
            "GROUP": self.group,
            "PIECES": self.pieces,
            "CHUNKS": self.chunks,
            "WARPS": self.warps,
            "num_warps": self.warps,
        }


def held(w_q: Tensor, w_scale: Tensor) -> Held | None:
    """How a weight is divided on its GPU; None where it has to be in registers.

    That is on a GPU without a copy engine, for a weight of 8 bits, of too few rows or too many
    bytes, of rows that are no aligned multiple of 16 bytes, and for groups that are no power of two
    in 32 to 1,024.
    """
    if w_q.dtype != torch.uint8 or not can_chain(w_q.device):
        return None
    return division(w_q, w_scale, processors(w_q.device))


def division(w_q: Tensor, w_scale: Tensor, count: int) -> Held | None:
    """`held` of a weight of 4 bits, for `count` multiprocessors with a copy engine."""
    n, row_bytes = w_q.shape
    group = 2 * row_bytes // w_scale.shape[1]
    share = triton.cdiv(n, count)
    warps = 8 if share >= MANY_ROWS else 4
    pieces = triton.cdiv(row_bytes, 4 * PIECE)
    how = Held(2 * row_bytes, group, pieces, triton.cdiv(share, warps), warps)
    aligned = row_bytes % 16 == 0 and w_q.data_ptr() % 16 == 0 and w_q.is_contiguous()
    known = group & (group - 1) == 0 and 32 <= group <= 8 * PIECE
    return how if share >= LEAST_ROWS and how.bytes <= ROOM and aligned and known else None


def descriptor(w_q: Tensor, how: Held) -> Any:
    """What the pieces of a chunk's rows are copied by: the weight as words, in plain order."""
    layout = gl.NVMMASharedLayout(0, 32, 2)
    return TensorDescriptor.from_tensor(w_q.view(torch.int32), [how.warps, PIECE], layout)


@gluon.jit
def _append(items, item):
    return items + (item,)  # noqa: RUF005 (Triton knows no star)


@gluon.jit
def _ask(w, tiles, ready, first, PIECES: gl.constexpr, CHUNKS: gl.constexpr):
    """Have the rows of the weight from `first` on copied, two chunks at a time.

    With more on their way, the small reads of kernels in front would have to wait behind them.
    """
    for chunk in gl.static_range(CHUNKS):
        mbarrier.init(ready.index(chunk), count=1)
        mbarrier.expect(ready.index(chunk), PIECES * w.block_type.nbytes)
    for i in range(CHUNKS * PIECES):
        asked = i // PIECES
        if (i % PIECES == 0) & (asked >= 2):
            mbarrier.wait(ready.index(asked - 2), 0)
        corner = [first + asked * w.block_type.shape[0], i % PIECES * 128]
        tma.async_copy_global_to_shared(w, corner, ready.index(asked), tiles.index(i))


@gluon.jit
def _await_weight(ready, CHUNKS: gl.constexpr):
    """Wait until all chunks are there; what told so is not needed again."""
    for chunk in gl.static_range(CHUNKS):
        mbarrier.wait(ready.index(chunk), 0)
    for chunk in gl.static_range(CHUNKS):
        mbarrier.invalidate(ready.index(chunk))


@gluon.jit
def _group_scales(
    w_scale, first, N, K: gl.constexpr, GROUP: gl.constexpr, PIECES: gl.constexpr,
    CHUNKS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The scale of the group in which a thread's four words of a piece lie, chunk by chunk."""
    FOURS: gl.constexpr = gl.SliceLayout(
        2, gl.BlockedLayout([1, 1, 4], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0])
    )
    row = first + gl.arange(0, WARPS, gl.SliceLayout(1, FOURS))
    word = gl.arange(0, 32, gl.SliceLayout(0, FOURS)) * 4
    scales = ()
    for c in gl.static_range(CHUNKS):
        kept = gl.minimum(row + c * WARPS, N - 1)
        for p in gl.static_range(PIECES):
            group = gl.minimum((word + p * 128) // (GROUP // 8), K // GROUP - 1)
            at = w_scale + kept.to(gl.int64)[:, None] * (K // GROUP) + group[None, :]
            scales = _append(scales, gl.load(at))
    return scales


@gluon.jit
def _factors(low, high, TILE: gl.constexpr):
    """The words of a row by which the low bits of a piece are multiplied, and the high ones.

    Third, -8 times the sum of both: the bits of a weight are its value plus 8.
    """
    low, high = low[None, :], high[None, :]
    eights = gl.full([1, 128], _EIGHTS, gl.int32, TILE)
    none = gl.zeros([1, 128], gl.int32, TILE)
    return low, high, dot4(high, eights, dot4(low, eights, none))


@gluon.jit
def _load_factors(
    x, K: gl.constexpr, GROUP: gl.constexpr, PIECES: gl.constexpr, TILE: gl.constexpr
):
    """`_factors` of the row of int8 values at x (words)."""
    loaded = ()
    for p in gl.static_range(PIECES):
        word = p * 128 + gl.arange(0, 128, gl.SliceLayout(0, TILE))
        at = x + word // (GROUP // 8) * (GROUP // 4) + word % (GROUP // 8)
        low = gl.load(at, mask=word < K // 8, other=0)
        loaded = _append(loaded, (low, gl.load(at + GROUP // 8, mask=word < K // 8, other=0)))
    factors = ()
    for p in gl.static_range(PIECES):  # when all are on their way
        low, high = loaded[p]
        factors = _append(factors, _factors(low, high, TILE))
    return factors


@gluon.jit
def _load_row(start, N: gl.constexpr, LAYOUT: gl.constexpr):
    """N contiguous values from `start` on, as many a piece as a piece of words multiplies."""
    pieces = ()
    for i in gl.static_range((N + 1023) // 1024):
        column = i * 1024 + gl.arange(0, 1024, LAYOUT)
        if (i + 1) * 1024 <= N:
            pieces = _append(pieces, gl.load(start + column))
        else:
            pieces = _append(pieces, gl.load(start + column, mask=column < N, other=0.0))
    return pieces


@gluon.jit
def _quantised(pieces, largest, GROUP: gl.constexpr, TILE: gl.constexpr):
    """`quantize_dynamic` of a row whose largest magnitude is known: (its `_factors`, its scale).

    A piece is dealt out on its way through shared memory: the first half of each group, the second.
    """
    scale = scale_for(largest)
    inverse = inverse_of(scale)
    boards = ()
    for i in gl.static_range(len(pieces)):
        q = to_int8_within(pieces[i], inverse).reshape([1024 // GROUP, 2, GROUP // 2])
        board = gl.allocate_shared_memory(
            gl.int8,
            [2, 512],
            gl.SwizzledSharedLayout(1, 1, 1, [1, 0]),
            q.permute((1, 0, 2)).reshape([2, 512]),
        )
        boards = _append(boards, board)
    factors = ()
    for i in gl.static_range(len(pieces)):
        words = boards[i]._reinterpret(gl.int32, [2, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        low = words.index(0).load(gl.SliceLayout(0, TILE))
        high = words.index(1).load(gl.SliceLayout(0, TILE))
        factors = _append(factors, _factors(low, high, TILE))
    return factors, scale


@gluon.jit
def _stacked(x, COUNT: gl.constexpr):
    """Tensors [a, b] of a tuple as [COUNT, a, b], COUNT a power of two: the first fills it up."""
    a: gl.constexpr = x[0].shape[0]
    b: gl.constexpr = x[0].shape[1]
    y = ()
    for i in gl.static_range(COUNT):
        y = _append(y, x[i if i < len(x) else 0].reshape([a, b, 1]))
    for step in gl.static_range(COUNT.bit_length() - 1):
        pairs = ()
        for i in gl.static_range(len(y) // 2):
            both = gl.join(y[i], y[i + len(y) // 2])
            pairs = _append(pairs, both.reshape([a, b, 2 << step]))
        y = pairs
    return y[0].permute((2, 0, 1))


@gluon.jit
def _product(
    tiles, factors, scales, PIECES: gl.constexpr, CHUNKS: gl.constexpr, WARPS: gl.constexpr,
    TILE: gl.constexpr, SUMS: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """float32 [PLACES]: a program's rows of the weight times a row, without the row's scale.

    What the threads of a warp have summed up goes through shared memory, after which two threads
    share a row, and each row has its own.
    """
    totals = ()
    for c in gl.static_range(CHUNKS):
        total = scales[c * PIECES] * 0.0
        for p in gl.static_range(PIECES):
            low, high, offset = factors[p]
            words = tiles.index(c * PIECES + p).load(TILE)
            dots = dot4(words & 0x0F0F0F0F, low, offset)
            dots = dot4((words >> 4) & 0x0F0F0F0F, high, dots)
            fours = gl.sum(dots.reshape([WARPS, 32, 4]), 2)
            fours = gl.convert_layout(fours, total.type.layout, assert_trivial=True)
            total = gl.fma(fours.to(gl.float32), scales[c * PIECES + p], total)
        totals = _append(totals, total)
    board = gl.allocate_shared_memory(
        gl.float32,
        [PLACES, 32],
        gl.SwizzledSharedLayout(4, 1, 8, [1, 0]),
        _stacked(totals, PLACES // WARPS).reshape([PLACES, 32]),
    )
    return gl.sum(board.load(SUMS), 1)


@gluon.jit
def linear_kernel(
    x, x_stride, x_scale, x_scale_step, rows, w, w_scale, w_scale_step, bias, residual,
    residual_stride, out, N,
    K: gl.constexpr,
    GROUP: gl.constexpr,
    PIECES: gl.constexpr,
    CHUNKS: gl.constexpr,
    WARPS: gl.constexpr,
    CHAIN: gl.constexpr,
):  # fmt: skip
    """`_linear_kernel` of `ssmc.kernels.matvec`; w is the descriptor of its words."""
    TILE: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    SUMS: gl.constexpr = gl.BlockedLayout([1, 16], [16, 2], [WARPS, 1], [1, 0])
    PLACES: gl.constexpr = WARPS * triton.next_power_of_2(CHUNKS)
    first = gl.program_id(0) * (CHUNKS * WARPS)
    let_next_load(CHAIN)
    tiles = gl.allocate_shared_memory(gl.int32, [CHUNKS * PIECES, WARPS, 128], w.layout)
    ready = gl.allocate_shared_memory(gl.int64, [CHUNKS, 1], mbarrier.MBarrierLayout())
    _ask(w, tiles, ready, first, PIECES, CHUNKS)
    place = gl.arange(0, PLACES, gl.SliceLayout(1, SUMS))
    n = first + place
    own = (place < CHUNKS * WARPS) & (n < N)
    kept = gl.minimum(n, N - 1)
    b = load_bias(bias, kept)
    scales = _group_scales(w_scale, first, N, K, GROUP, PIECES, CHUNKS, WARPS)
    _await_weight(ready, CHUNKS)
    await_inputs(CHAIN)
    for row in range(rows):
        scale = gl.load(x_scale + row * x_scale_step)
        before = load_residual(residual, residual_stride, row, kept)
        factors = _load_factors(x + row * x_stride, K, GROUP, PIECES, TILE)
        y = _product(tiles, factors, scales, PIECES, CHUNKS, WARPS, TILE, SUMS, PLACES) * scale
        gl.store(out + row * N + n, before + (y + b), mask=own)


@gluon.jit
def in_proj_kernel(
    x, x_stride, norm_weight, eps, rows, w, w_scale, w_scale_step, bias, out_scale, out_scale_step,
    conv_start, conv_w, conv_w_scale, conv_w_scale_step, conv_bias, state, u_scale, q, u_q, y, N, C,
    U,
    TAPS: gl.constexpr,
    SILU: gl.constexpr,
    K: gl.constexpr,
    GROUP: gl.constexpr,
    PIECES: gl.constexpr,
    CHUNKS: gl.constexpr,
    WARPS: gl.constexpr,
    CHAIN: gl.constexpr,
):  # fmt: skip
    """`_in_proj_kernel` of `ssmc.kernels.matvec_conv`; w is the descriptor of its words."""
    TILE: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    SUMS: gl.constexpr = gl.BlockedLayout([1, 16], [16, 2], [WARPS, 1], [1, 0])
    ROW: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    PLACES: gl.constexpr = WARPS * triton.next_power_of_2(CHUNKS)
    first = gl.program_id(0) * (CHUNKS * WARPS)
    let_next_load(CHAIN)
    tiles = gl.allocate_shared_memory(gl.int32, [CHUNKS * PIECES, WARPS, 128], w.layout)
    ready = gl.allocate_shared_memory(gl.int64, [CHUNKS, 1], mbarrier.MBarrierLayout())
    _ask(w, tiles, ready, first, PIECES, CHUNKS)
    place = gl.arange(0, PLACES, gl.SliceLayout(1, SUMS))
    n = first + place
    own = (place < CHUNKS * WARPS) & (n < N)
    kept = gl.minimum(n, N - 1)
    c = gl.where(own, n - conv_start, -1)
    inside = (c >= 0) & (c < C)
    norm_weights = ()
    if norm_weight is not None:
        norm_weights = _load_row(norm_weight, K, ROW)
    q_scale = gl.load(out_scale + kept * out_scale_step)
    b = load_bias(bias, kept)
    taps = load_taps(conv_w, conv_w_scale, conv_w_scale_step, conv_bias, c, inside, TAPS)
    channel_scale = gl.load(u_scale + c, mask=inside & (c < U), other=1.0)
    scales = _group_scales(w_scale, first, N, K, GROUP, PIECES, CHUNKS, WARPS)
    _await_weight(ready, CHUNKS)
    await_inputs(CHAIN)
    for row in range(rows):
        pieces = _load_row(x + row * x_stride, K, ROW)
        row_state = state + row * ((TAPS - 1) * C)
        history = load_history(row_state, c, inside, C, TAPS)
        pieces, largest = normed(pieces, norm_weights, eps, K)
        factors, scale = _quantised(pieces, largest, GROUP, TILE)
        value = _product(tiles, factors, scales, PIECES, CHUNKS, WARPS, TILE, SUMS, PLACES) * scale
        result = to_int8(value + b, inverse_of(q_scale))
        gl.store(q + row * N + n, result, mask=own)
        conv_step(
            result, q_scale, history, taps, row_state, channel_scale, u_q + row * U,
            y + row * (C - U), c, inside, C, U, TAPS, SILU,
        )  # fmt: skip
