"""The int8 product of many rows by programs that stay: one warp loads, two groups of four multiply.

The warp that loads runs ahead by as many blocks of the depth as shared memory has room for, into
the next tile too, so that a group which has ended its rows of a tile scales and writes them while
another still multiplies, and finds the next blocks in place. Nothing else differs from
`ssmc.kernels.matmul`: the same bits.
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

from ssmc.kernels.launch import await_inputs
from ssmc.kernels.matmul_hopper import finish, keep_columns, layouts, prefetch_tile
from ssmc.kernels.tiles import Tiling, tile_of

_SHARED = 232_448 - 256  # bytes of shared memory in a processor, less what barriers need


def fits(how: Tiling) -> bool:
    """Whether the rows of the tile are 64 for each of two groups."""
    return how.block_m == 128


def constants(
    how: Tiling,
    small: bool,
    k: int,
    bias: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
) -> dict[str, Any]:
    """The kernel's constants for a depth of k; `small` says that every sum is a float32.

    The pipeline has as many stages as wanted, where shared memory has the room beside what the
    groups keep of the columns and exchange of an int8 result.
    """
    blocks = triton.cdiv(k, how.block_k)
    kept = 4 * how.width * (1 + (bias is not None) + (out_scale is not None))
    exchanged = 0 if out_scale is None else 4096
    room = (_SHARED - 2 * (kept + exchanged)) // ((how.block_m + how.width) * how.block_k)
    stages = min(how.stages, room, blocks)
    lines = how.block_m * triton.cdiv(how.width, 32)
    share = triton.next_power_of_2(max(32, triton.cdiv(lines, max(1, blocks - stages))))
    return {
        **layouts(how, how.block_m // 2, 4),
        "BLOCK_M": how.block_m,
        "STAGES": stages,
        "SMALL": small,
        "LINES": 0 if residual is None else share,
        "num_warps": 4,
    }


@gluon.jit
def _load(
    x, w, extra, residual, x_tiles, w_tiles, extra_tiles, full, empty, M, N, K, residual_stride,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    EXTRA_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    LINES: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Copy the blocks after the first STAGES, each into the place of one that was multiplied."""
    WIDTH: gl.constexpr = BLOCK_N + EXTRA_N
    size: gl.constexpr = (BLOCK_M + WIDTH) * BLOCK_K
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, WIDTH)
    blocks = gl.cdiv(K, BLOCK_K)
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP)
        top = tile_m * BLOCK_M
        first = tile_n * WIDTH
        # Those of the first tile are on their way.
        begin = gl.where(tile == gl.program_id(0), STAGES, 0)
        for k in range(begin, blocks):
            bar = full.index(slot)
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(bar, size)
            tma.async_copy_global_to_shared(w, [first, k * BLOCK_K], bar, w_tiles.index(slot))
            if EXTRA_N > 0:
                tma.async_copy_global_to_shared(
                    extra, [first + BLOCK_N, k * BLOCK_K], bar, extra_tiles.index(slot)
                )
            tma.async_copy_global_to_shared(x, [top, k * BLOCK_K], bar, x_tiles.index(slot))
            if LINES > 0 and k >= STAGES:
                prefetch_tile(
                    residual, top, first, M, N, residual_stride, (k - STAGES) * LINES, WIDTH,
                    LINES, gl.BlockedLayout([1], [32], [1], [0]),
                )  # fmt: skip
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1


@gluon.jit
def _multiply(
    x_tiles, w_tiles, extra_tiles, full, empty, x_scale, w_scale, bias, residual, out_scale, y,
    M, N, K, residual_stride,
    INDEX: gl.constexpr,
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
):  # fmt: skip
    """Multiply, scale and write the rows of group INDEX of each tile."""
    WIDTH: gl.constexpr = BLOCK_N + EXTRA_N
    ROWS: gl.constexpr = BLOCK_M // 2
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, WIDTH)
    blocks = gl.cdiv(K, BLOCK_K)
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP)
        top = tile_m * BLOCK_M + INDEX * ROWS
        first = tile_n * WIDTH
        kept = keep_columns(first, N, w_scale, bias, out_scale, BLOCK_N, LINE, W_STEP, OUT_STEP)
        sums = gl.zeros((ROWS, BLOCK_N), gl.int32, layout=LAYOUT)
        if EXTRA_N > 0:
            kept_more = keep_columns(
                first + BLOCK_N, N, w_scale, bias, out_scale, EXTRA_N, LINE, W_STEP, OUT_STEP
            )
            more = gl.zeros((ROWS, EXTRA_N), gl.int32, layout=EXTRA_LAYOUT)
        for k in range(blocks):
            mbarrier.wait(full.index(slot), phase)
            x_tile = x_tiles.index(slot).slice(INDEX * ROWS, ROWS)
            sums = warpgroup_mma(x_tile, w_tiles.index(slot).permute((1, 0)), sums, is_async=True)
            if EXTRA_N > 0:
                extra_tile = extra_tiles.index(slot).permute((1, 0))
                more = warpgroup_mma(x_tile, extra_tile, more, is_async=True)
                sums, more = warpgroup_mma_wait(2, deps=(sums, more))
            else:
                sums = warpgroup_mma_wait(1, deps=(sums,))
            # The block before this one has been multiplied: its place is free.
            before = gl.where(slot == 0, STAGES - 1, slot - 1)
            mbarrier.arrive(empty.index(before), pred=k > 0)
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        if EXTRA_N > 0:
            sums, more = warpgroup_mma_wait(0, deps=(sums, more))
        else:
            sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(empty.index(gl.where(slot == 0, STAGES - 1, slot - 1)))
        finish(
            sums, kept, top, first, M, N, x_scale, bias, residual, residual_stride, out_scale, y,
            0, ROWS, BLOCK_N, PIECE, STORED, SMALL, X_STEP,
        )  # fmt: skip
        if EXTRA_N > 0:
            finish(
                more, kept_more, top, first + BLOCK_N, M, N, x_scale, bias, residual,
                residual_stride, out_scale, y, 0, ROWS, EXTRA_N, EXTRA_PIECE, EXTRA_STORED, SMALL,
                X_STEP,
            )  # fmt: skip


@gluon.jit
def linear_kernel(
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
    LINES: gl.constexpr,
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
    size: gl.constexpr = (BLOCK_M + WIDTH) * BLOCK_K
    tile_m, tile_n = tile_of(gl.program_id(0), gl.cdiv(M, BLOCK_M), gl.cdiv(N, WIDTH), GROUP)
    first = tile_n * WIDTH
    x_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, BLOCK_K], x.layout)
    w_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, BLOCK_K], w.layout)
    extra_tiles = w_tiles
    if EXTRA_N > 0:
        extra_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, EXTRA_N, BLOCK_K], extra.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        bar = full.index(i)
        mbarrier.expect(bar, size)
        tma.async_copy_global_to_shared(w, [first, i * BLOCK_K], bar, w_tiles.index(i))
        if EXTRA_N > 0:
            tma.async_copy_global_to_shared(
                extra, [first + BLOCK_N, i * BLOCK_K], bar, extra_tiles.index(i)
            )
    await_inputs(CHAIN)
    for i in gl.static_range(STAGES):
        tma.async_copy_global_to_shared(
            x, [tile_m * BLOCK_M, i * BLOCK_K], full.index(i), x_tiles.index(i)
        )
    gl.warp_specialize(
        [
            (_multiply, (
                x_tiles, w_tiles, extra_tiles, full, empty, x_scale, w_scale, bias, residual,
                out_scale, y, M, N, K, residual_stride, 0, BLOCK_M, BLOCK_N, EXTRA_N, BLOCK_K,
                STAGES, SMALL, X_STEP, W_STEP, OUT_STEP, GROUP, LAYOUT,
                EXTRA_LAYOUT, PIECE, EXTRA_PIECE, STORED, EXTRA_STORED, LINE,
            )),
            (_multiply, (
                x_tiles, w_tiles, extra_tiles, full, empty, x_scale, w_scale, bias, residual,
                out_scale, y, M, N, K, residual_stride, 1, BLOCK_M, BLOCK_N, EXTRA_N, BLOCK_K,
                STAGES, SMALL, X_STEP, W_STEP, OUT_STEP, GROUP, LAYOUT,
                EXTRA_LAYOUT, PIECE, EXTRA_PIECE, STORED, EXTRA_STORED, LINE,
            )),
            (_load, (
                x, w, extra, residual, x_tiles, w_tiles, extra_tiles, full, empty, M, N, K,
                residual_stride, BLOCK_M, BLOCK_N, EXTRA_N, BLOCK_K, STAGES, LINES, GROUP,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
