"""The int8 product of many rows with Hopper's asynchronous tensor cores, in Gluon.

Triton's own `dot` of integers waits for each block of the sum before it asks for the next; here the
tensor cores always have one block waiting. Nothing else differs from `ssmc.kernels.matmul`: the
same tiles in the same order, the same bits.
"""

from __future__ import annotations

from typing import Any

import triton
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
from ssmc.kernels.prefetch import prefetch
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


def constants(how: Tiling, small: bool, residual: Tensor | None) -> dict[str, Any]:
    """The kernel's constants; `small` says that every sum is a float32."""
    lines = how.block_m * triton.cdiv(how.width, 32)
    return {
        **layouts(how, how.block_m, how.warps),
        "BLOCK_M": how.block_m,
        "STAGES": how.stages,
        "SMALL": small,
        "LINES": 0 if residual is None else triton.next_power_of_2(lines),
        "num_warps": how.warps,
    }


def layouts(how: Tiling, rows: int, warps: int) -> dict[str, Any]:
    """Where `rows` rows of the parts of a tile lie in the registers of so many warps, by name.

    A warp group has 64 rows, all columns. No instruction for integers is wider than 128 columns
    here (Triton knows none of 256). What follows the sums is done on pieces of 64 columns, which
    leaves the registers room for its operands.
    """

    def product(width: int) -> Any:
        return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, min(width, 128), 32])

    def stored(width: int) -> Any:
        across = width // 16
        return gl.BlockedLayout([1, 16], [32 // across, across], [warps, 1], [1, 0])

    piece, extra_piece = min(how.block_n, 64), min(how.extra_n or 16, 64)
    return {
        "BLOCK_N": how.block_n,
        "EXTRA_N": how.extra_n,
        "BLOCK_K": how.block_k,
        "LAYOUT": product(how.block_n),
        "EXTRA_LAYOUT": product(how.extra_n or 16),
        "PIECE": product(piece),
        "EXTRA_PIECE": product(extra_piece),
        "STORED": stored(piece),
        "EXTRA_STORED": stored(extra_piece),
        "LINE": gl.BlockedLayout([1], [32], [warps], [0]),
    }


@gluon.jit
def _copy_x(x, x_tiles, ready, slot, top, k, enabled):
    """Ask for a block of x, into the place `slot`."""
    tma.async_copy_global_to_shared(
        x, [top, k], ready.index(slot), x_tiles.index(slot), pred=enabled
    )


@gluon.jit
def _copy_w(
    x, w, extra, w_tiles, extra_tiles, ready, slot, first, second, k, enabled,
    EXTRA_N: gl.constexpr,
):  # fmt: skip
    """Ask for a block of w, into the place `slot`, which is to wait for that of x too."""
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
def prefetch_tile(
    matrix, top, first, M, N, stride, begin,
    WIDTH: gl.constexpr,
    LINES: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Bring lines begin .. begin + LINES of a tile of floats into the cache."""
    ACROSS: gl.constexpr = (WIDTH + 31) // 32
    line = begin + gl.arange(0, LINES, layout=LAYOUT)
    row = gl.minimum(top + line // ACROSS, M - 1).to(gl.int64)
    column = gl.minimum(first + line % ACROSS * 32, N - 1)
    address = matrix + row * stride + column
    prefetch(address)


@gluon.jit
def keep_columns(
    first, N, w_scale, bias, out_scale,
    WIDTH: gl.constexpr,
    LINE: gl.constexpr,
    W_STEP: gl.constexpr,
    OUT_STEP: gl.constexpr,
):  # fmt: skip
    """Shared memory [KINDS, WIDTH] of what there is one of a column: scale, bias, inverse scale."""
    KINDS: gl.constexpr = 1 + (bias is not None) + (out_scale is not None)
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    kept = gl.allocate_shared_memory(gl.float32, [KINDS, WIDTH], layout)
    column = first + gl.arange(0, WIDTH, layout=LINE)
    inside = column < N
    kept.index(0).store(gl.load(w_scale + column * W_STEP, mask=inside, other=1.0))
    if bias is not None:
        kept.index(1).store(gl.load(bias + column, mask=inside, other=0.0))
    if out_scale is not None:
        inverse = inverse_of(gl.load(out_scale + column * OUT_STEP, mask=inside, other=1.0))
        kept.index(KINDS - 1).store(inverse)
    return kept


@gluon.jit
def finish(
    sums, kept, top, first, M, N, x_scale, bias, residual, residual_stride, out_scale, y,
    START: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PIECE: gl.constexpr,
    STORED: gl.constexpr,
    SMALL: gl.constexpr,
    X_STEP: gl.constexpr,
):  # fmt: skip
    """Scale the sums, do what follows, and write the tile: halves apart down to 64 columns.

    `kept` is of `keep_columns`, whose column START is the first here.
    """
    if BLOCK_N > 64:
        HALF: gl.constexpr = BLOCK_N // 2
        left, right = sums.reshape([BLOCK_M, 2, HALF]).permute(0, 2, 1).split()
        finish(
            left, kept, top, first, M, N, x_scale, bias, residual, residual_stride, out_scale, y,
            START, BLOCK_M, HALF, PIECE, STORED, SMALL, X_STEP,
        )  # fmt: skip
        finish(
            right, kept, top, first + HALF, M, N, x_scale, bias, residual, residual_stride,
            out_scale, y, START + HALF, BLOCK_M, HALF, PIECE, STORED, SMALL, X_STEP,
        )  # fmt: skip
    else:
        KINDS: gl.constexpr = 1 + (bias is not None) + (out_scale is not None)
        across: gl.constexpr = gl.SliceLayout(0, PIECE)
        sums = gl.convert_layout(sums, PIECE, assert_trivial=True)
        row = top + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, PIECE))
        column = first + gl.arange(0, BLOCK_N, layout=across)
        w_factor = kept.index(0).slice(START, BLOCK_N).load(across)
        x_factor = gl.load(x_scale + row * X_STEP, mask=row < M, other=1.0)
        scale = x_factor[:, None] * w_factor[None, :]
        value = sums.to(gl.float32) * scale if SMALL else times_scale(sums, scale)
        if bias is not None:
            value += kept.index(1).slice(START, BLOCK_N).load(across)[None, :]
        inside = (row < M)[:, None] & (column < N)[None, :]
        line = row.to(gl.int64)[:, None]
        if residual is not None:
            address = residual + line * residual_stride + column[None, :]
            value = gl.load(address, mask=inside, other=0.0) + value
        if out_scale is not None:
            inverse = kept.index(KINDS - 1).slice(START, BLOCK_N).load(across)
            # Rows of 16 bytes a thread.
            q = gl.convert_layout(to_int8(value, inverse[None, :]), STORED)
            row = top + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, STORED))
            column = first + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, STORED))
            inside = (row < M)[:, None] & (column < N)[None, :]
            gl.store(y + row.to(gl.int64)[:, None] * N + column[None, :], q, mask=inside)
        else:
            gl.store(y + line * N + column[None, :], value, mask=inside)


@gluon.jit
def _store_sums(sums, top, first, M, N, y, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Write a tile of sums as they are."""
    row = top + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, sums.type.layout))
    column = first + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, sums.type.layout))
    inside = (row < M)[:, None] & (column < N)[None, :]
    gl.store(y + row.to(gl.int64)[:, None] * N + column[None, :], sums, mask=inside)


@gluon.jit
def linear_kernel(  # noqa: C901
    x, w, extra, x_scale, w_scale, bias, residual, out_scale, y, M, N, K, residual_stride, depth,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    EXTRA_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    LINES: gl.constexpr,
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
    """`_linear_kernel` of `ssmc.kernels.matmul`; x, w, extra are descriptors of their tiles.

    Without scales the sums over each `depth` columns of x, one program's, are the result
    [K / depth, M, N].
    """
    WIDTH: gl.constexpr = BLOCK_N + EXTRA_N
    tile_m, tile_n = tile_of(gl.program_id(0), gl.cdiv(M, BLOCK_M), gl.cdiv(N, WIDTH), GROUP)
    top = tile_m * BLOCK_M
    first = tile_n * WIDTH
    second = first + BLOCK_N
    begin = gl.program_id(1) * depth
    blocks = gl.cdiv(gl.minimum(depth, K - begin), BLOCK_K)
    x_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, BLOCK_K], x.layout)
    w_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, BLOCK_K], w.layout)
    extra_tiles = w_tiles
    if EXTRA_N > 0:
        extra_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, EXTRA_N, BLOCK_K], extra.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    for i in gl.static_range(STAGES):
        _copy_w(
            x, w, extra, w_tiles, extra_tiles, ready, i, first, second, begin + i * BLOCK_K,
            i < blocks, EXTRA_N,
        )  # fmt: skip
    if x_scale is not None:
        kept = keep_columns(first, N, w_scale, bias, out_scale, BLOCK_N, LINE, W_STEP, OUT_STEP)
        if EXTRA_N > 0:
            kept_more = keep_columns(
                second, N, w_scale, bias, out_scale, EXTRA_N, LINE, W_STEP, OUT_STEP
            )
    await_inputs(CHAIN)
    for i in gl.static_range(STAGES):
        _copy_x(x, x_tiles, ready, i, top, begin + i * BLOCK_K, i < blocks)
    if LINES > 0:
        prefetch_tile(residual, top, first, M, N, residual_stride, 0, WIDTH, LINES, LINE)
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
        ahead = i - 1 + STAGES
        enabled = (i > 0) & (ahead < blocks)
        _copy_w(
            x, w, extra, w_tiles, extra_tiles, ready, before, first, second,
            begin + ahead * BLOCK_K, enabled, EXTRA_N,
        )  # fmt: skip
        _copy_x(x, x_tiles, ready, before, top, begin + ahead * BLOCK_K, enabled)
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
    if x_scale is None:
        y += gl.program_id(1).to(gl.int64) * M * N
        _store_sums(sums, top, first, M, N, y, BLOCK_M, BLOCK_N)
        if EXTRA_N > 0:
            _store_sums(more, top, second, M, N, y, BLOCK_M, EXTRA_N)
    else:
        finish(
            sums, kept, top, first, M, N, x_scale, bias, residual, residual_stride, out_scale, y,
            0, BLOCK_M, BLOCK_N, PIECE, STORED, SMALL, X_STEP,
        )  # fmt: skip
        if EXTRA_N > 0:
            finish(
                more, kept_more, top, second, M, N, x_scale, bias, residual, residual_stride,
                out_scale, y, 0, BLOCK_M, EXTRA_N, EXTRA_PIECE, EXTRA_STORED, SMALL, X_STEP,
            )  # fmt: skip
