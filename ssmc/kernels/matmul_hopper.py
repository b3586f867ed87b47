"""The int8 product of many rows with Hopper's asynchronous tensor cores, in Gluon.

Triton's own `dot` of integers waits for each block of the sum before it asks for the next; here the
tensor cores always have one block waiting. Nothing else differs from `ssmc.kernels.matmul`: the
same tiles in the same order, the same bits.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ssmc.kernels.arithmetic import inverse_of, times_scale, to_int8
from ssmc.kernels.launch import await_inputs
from ssmc.kernels.tiles import Tiling, tile_of


def fits(how: Tiling) -> bool:
    """Whether the tile can be multiplied by as many warp groups, each with 64 of its rows."""
    return how.block_m == 16 * how.warps and how.warps % 4 == 0


def descriptors(x: Tensor, w: Tensor, how: Tiling) -> tuple[Any, Any, Any]:
    """What the tiles of x and of both parts of w are copied by."""
    return (
        _descriptor(x, how.block_m, how.block_k),
        _descriptor(w, how.block_n, how.block_k),
        _descriptor(w, how.extra_n or how.block_n, how.block_k),
    )


def _descriptor(matrix: Tensor, height: int, width: int) -> Any:
    layout = gl.NVMMASharedLayout.get_default_for([height, width], gl.int8)
    return TensorDescriptor.from_tensor(matrix, [height, width], layout)


def constants(how: Tiling, small: bool) -> dict[str, Any]:
    """The kernel's constants; `small` says that every sum is a float32.

    Where the parts of a tile lie in registers: a warp group has 64 rows, all columns. No
    instruction for integers is wider than 128 columns here (Triton knows none of 256). What follows
    the sums is done on pieces of 64 columns, which leaves the registers room for its operands.
    """
    warps = [how.warps, 1]

    def product(width: int) -> Any:
        return gl.NVMMADistributedLayout([3, 0], warps, [16, min(width, 128), 32])

    def stored(width: int) -> Any:
        across = width // 16
        return gl.BlockedLayout([1, 16], [32 // across, across], warps, [1, 0])

    piece, extra_piece = min(how.block_n, 64), min(how.extra_n or 16, 64)
    return {
        "BLOCK_M": how.block_m,
        "BLOCK_N": how.block_n,
        "EXTRA_N": how.extra_n,
        "BLOCK_K": how.block_k,
        "STAGES": how.stages,
        "SMALL": small,
        "LAYOUT": product(how.block_n),
        "EXTRA_LAYOUT": product(how.extra_n or 16),
        "PIECE": product(piece),
        "EXTRA_PIECE": product(extra_piece),
        "STORED": stored(piece),
        "EXTRA_STORED": stored(extra_piece),
        "LINE": gl.BlockedLayout([1], [32], [how.warps], [0]),
        "num_warps": how.warps,
    }


@gluon.jit
def _copy_x(x, x_tiles, ready, slot, top, k, enabled):  # noqa: ANN202
    """Ask for the next block of x, into the place `slot`."""
    tma.async_copy_global_to_shared(
        x, [top, k], ready.index(slot), x_tiles.index(slot), pred=enabled
    )


@gluon.jit
def _copy_w(  # noqa: ANN202
    x, w, extra, w_tiles, extra_tiles, ready, slot, first, second, k, enabled,
    EXTRA_N: gl.constexpr,
):  # fmt: skip
    """Ask for the next block of w, into the place `slot`, which is to wait for that of x too."""
    bar = ready.index(slot)
    size: gl.constexpr = x.block_type.nbytes + w.block_type.nbytes
    if EXTRA_N > 0:
        mbarrier.expect(bar, size + extra.block_type.nbytes, pred=enabled)
    else:
        mbarrier.expect(bar, size, pred=enabled)
    tma.async_copy_global_to_shared(w, [first, k], bar, w_tiles.index(slot), pred=enabled)
    if EXTRA_N > 0:
        tma.async_copy_global_to_shared(
            extra, [second, k], bar, extra_tiles.index(slot), pred=enabled
        )


@gluon.jit
def _finish(  # noqa: ANN202
    sums, top, first, M, N, x_scale, w_scale, bias, residual, residual_stride, out_scale, y,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PIECE: gl.constexpr,
    STORED: gl.constexpr,
    LINE: gl.constexpr,
    SMALL: gl.constexpr,
    X_STEP: gl.constexpr,
    W_STEP: gl.constexpr,
    OUT_STEP: gl.constexpr,
):  # fmt: skip
    """Scale the sums, do what follows, and write the tile: halves apart down to 64 columns."""
    if BLOCK_N > 64:
        HALF: gl.constexpr = BLOCK_N // 2
        left, right = sums.reshape([BLOCK_M, 2, HALF]).permute(0, 2, 1).split()
        _finish(
            left, top, first, M, N, x_scale, w_scale, bias, residual, residual_stride, out_scale, y,
            BLOCK_M, HALF, PIECE, STORED, LINE, SMALL, X_STEP, W_STEP, OUT_STEP,
        )  # fmt: skip
        _finish(
            right, top, first + HALF, M, N, x_scale, w_scale, bias, residual, residual_stride,
            out_scale, y, BLOCK_M, HALF, PIECE, STORED, LINE, SMALL, X_STEP, W_STEP, OUT_STEP,
        )  # fmt: skip
    else:
        sums = gl.convert_layout(sums, PIECE, assert_trivial=True)
        row = top + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, PIECE))
        column = first + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, PIECE))
        # What there is one of a column each thread loads and inverts a share of.
        one = first + gl.arange(0, BLOCK_N, layout=LINE)
        w_factor = gl.load(w_scale + one * W_STEP, mask=one < N, other=1.0)
        w_factor = gl.convert_layout(w_factor, gl.SliceLayout(0, PIECE))
        x_factor = gl.load(x_scale + row * X_STEP, mask=row < M, other=1.0)
        scale = x_factor[:, None] * w_factor[None, :]
        value = sums.to(gl.float32) * scale if SMALL else times_scale(sums, scale)
        if bias is not None:
            shift = gl.load(bias + one, mask=one < N, other=0.0)
            value += gl.convert_layout(shift, gl.SliceLayout(0, PIECE))[None, :]
        inside = (row < M)[:, None] & (column < N)[None, :]
        line = row.to(gl.int64)[:, None]
        if residual is not None:
            address = residual + line * residual_stride + column[None, :]
            value = gl.load(address, mask=inside, other=0.0) + value
        if out_scale is not None:
            inverse = inverse_of(gl.load(out_scale + one * OUT_STEP, mask=one < N, other=1.0))
            inverse = gl.convert_layout(inverse, gl.SliceLayout(0, PIECE))
            # Rows of 16 bytes a thread.
            q = gl.convert_layout(to_int8(value, inverse[None, :]), STORED)
            row = top + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, STORED))
            column = first + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, STORED))
            inside = (row < M)[:, None] & (column < N)[None, :]
            gl.store(y + row.to(gl.int64)[:, None] * N + column[None, :], q, mask=inside)
        else:
            gl.store(y + line * N + column[None, :], value, mask=inside)


@gluon.jit
def linear_kernel(  # noqa: C901
    x, w, extra, x_scale, w_scale, bias, residual, out_scale, y, M, N, K, residual_stride,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    EXTRA_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    SMALL: gl.constexpr,
    X_STEP: gl.constexpr,
    W_STEP: gl.constexpr,
    OUT_STEP: gl.constexpr,
    GROUP: gl.constexpr,
    LAYOUT: gl.constexpr,
    EXTRA_LAYOUT: gl.constexpr,
    PIECE: gl.constexpr,
    EXTRA_PIECE: gl.constexpr,
    STORED: gl.constexpr,
    EXTRA_STORED: gl.constexpr,
    LINE: gl.constexpr,
    CHAIN: gl.constexpr,
):  # fmt: skip
    """`_linear_kernel` of `ssmc.kernels.matmul`; x, w, extra are descriptors of their tiles."""
    WIDTH: gl.constexpr = BLOCK_N + EXTRA_N
    tile_m, tile_n = tile_of(gl.program_id(0), gl.cdiv(M, BLOCK_M), gl.cdiv(N, WIDTH), GROUP)
    top = tile_m * BLOCK_M
    first = tile_n * WIDTH
    second = first + BLOCK_N
    x_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, BLOCK_K], x.layout)
    w_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, BLOCK_K], w.layout)
    extra_tiles = w_tiles
    if EXTRA_N > 0:
        extra_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, EXTRA_N, BLOCK_K], extra.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    blocks = gl.cdiv(K, BLOCK_K)
    for i in gl.static_range(STAGES - 1):
        _copy_w(
            x, w, extra, w_tiles, extra_tiles, ready, i, first, second, i * BLOCK_K, i < blocks,
            EXTRA_N,
        )  # fmt: skip
    await_inputs(CHAIN)
    for i in gl.static_range(STAGES - 1):
        _copy_x(x, x_tiles, ready, i, top, i * BLOCK_K, i < blocks)
    sums = gl.zeros((BLOCK_M, BLOCK_N), gl.int32, layout=LAYOUT)
    if EXTRA_N > 0:
        more = gl.zeros((BLOCK_M, EXTRA_N), gl.int32, layout=EXTRA_LAYOUT)
    slot = 0
    phase = 0
    for i in range(blocks):
        mbarrier.wait(ready.index(slot), phase)
        x_tile = x_tiles.index(slot)
        w_tile = w_tiles.index(slot).permute((1, 0))
        sums = warpgroup_mma(x_tile, w_tile, sums, is_async=True)
        if EXTRA_N > 0:
            extra_tile = extra_tiles.index(slot).permute((1, 0))
            more = warpgroup_mma(x_tile, extra_tile, more, is_async=True)
            sums, more = warpgroup_mma_wait(2, deps=(sums, more))
        else:
            sums = warpgroup_mma_wait(1, deps=(sums,))
        # The block before this one has been multiplied: its place is free.
        before = gl.where(slot == 0, STAGES - 1, slot - 1)
        ahead = i + STAGES - 1
        _copy_w(
            x, w, extra, w_tiles, extra_tiles, ready, before, first, second, ahead * BLOCK_K,
            ahead < blocks, EXTRA_N,
        )  # fmt: skip
        _copy_x(x, x_tiles, ready, before, top, ahead * BLOCK_K, ahead < blocks)
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1
    if EXTRA_N > 0:
        sums, more = warpgroup_mma_wait(0, deps=(sums, more))
    else:
        sums = warpgroup_mma_wait(0, deps=(sums,))
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(i))
    _finish(
        sums, top, first, M, N, x_scale, w_scale, bias, residual, residual_stride, out_scale, y,
        BLOCK_M, BLOCK_N, PIECE, STORED, LINE, SMALL, X_STEP, W_STEP, OUT_STEP,
    )  # fmt: skip
    if EXTRA_N > 0:
        _finish(
            more, top, second, M, N, x_scale, w_scale, bias, residual, residual_stride, out_scale,
            y, BLOCK_M, EXTRA_N, EXTRA_PIECE, EXTRA_STORED, LINE, SMALL, X_STEP, W_STEP,
            OUT_STEP,
        )  # fmt: skip
