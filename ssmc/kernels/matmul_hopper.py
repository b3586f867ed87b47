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
    instruction for integers is wider than 128 columns here (Triton knows none of 256).
    """
    warps = [how.warps, 1]

    def product(width: int) -> Any:
        return gl.NVMMADistributedLayout([3, 0], warps, [16, min(width, 128), 32])

    def stored(width: int) -> Any:
        across = min(32, width // 16)
        return gl.BlockedLayout([1, 16], [32 // across, across], warps, [1, 0])

    return {
        "BLOCK_M": how.block_m,
        "BLOCK_N": how.block_n,
        "EXTRA_N": how.extra_n,
        "BLOCK_K": how.block_k,
        "STAGES": how.stages,
        "SMALL": small,
        "LAYOUT": product(how.block_n),
        "EXTRA_LAYOUT": product(how.extra_n or 16),
        "STORED": stored(how.block_n),
        "EXTRA_STORED": stored(how.extra_n or 16),
        "num_warps": how.warps,
    }


@gluon.jit
def _copy(  # noqa: ANN202
    x, w, extra, x_tiles, w_tiles, extra_tiles, ready, slot, top, first, second, k, enabled,
    EXTRA_N: gl.constexpr,
):  # fmt: skip
    """Ask for the next block of the sum, into the place `slot`."""
    bar = ready.index(slot)
    size: gl.constexpr = x.block_type.nbytes + w.block_type.nbytes
    if EXTRA_N > 0:
        mbarrier.expect(bar, size + extra.block_type.nbytes, pred=enabled)
    else:
        mbarrier.expect(bar, size, pred=enabled)
    tma.async_copy_global_to_shared(x, [top, k], bar, x_tiles.index(slot), pred=enabled)
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
    LAYOUT: gl.constexpr,
    STORED: gl.constexpr,
    SMALL: gl.constexpr,
    X_STEP: gl.constexpr,
    W_STEP: gl.constexpr,
    OUT_STEP: gl.constexpr,
):  # fmt: skip
    """Scale the sums, do what follows, and write the tile."""
    row = top + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LAYOUT))
    column = first + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
    x_factor = gl.load(x_scale + row * X_STEP, mask=row < M, other=1.0)
    w_factor = gl.load(w_scale + column * W_STEP, mask=column < N, other=1.0)
    scale = x_factor[:, None] * w_factor[None, :]
    value = sums.to(gl.float32) * scale if SMALL else times_scale(sums, scale)
    if bias is not None:
        value += gl.load(bias + column, mask=column < N, other=0.0)[None, :]
    inside = (row < M)[:, None] & (column < N)[None, :]
    line = row.to(gl.int64)[:, None]
    if residual is not None:
        address = residual + line * residual_stride + column[None, :]
        value = gl.load(address, mask=inside, other=0.0) + value
    if out_scale is not None:
        factor = gl.load(out_scale + column * OUT_STEP, mask=column < N, other=1.0)
        # Rows of 16 bytes a thread.
        q = gl.convert_layout(to_int8(value, inverse_of(factor)[None, :]), STORED)
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
    STORED: gl.constexpr,
    EXTRA_STORED: gl.constexpr,
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
    await_inputs(CHAIN)
    blocks = gl.cdiv(K, BLOCK_K)
    for i in gl.static_range(STAGES - 1):
        _copy(
            x, w, extra, x_tiles, w_tiles, extra_tiles, ready, i, top, first, second, i * BLOCK_K,
            i < blocks, EXTRA_N,
        )  # fmt: skip
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
        _copy(
            x, w, extra, x_tiles, w_tiles, extra_tiles, ready, before, top, first, second,
            ahead * BLOCK_K, ahead < blocks, EXTRA_N,
        )  # fmt: skip
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
        BLOCK_M, BLOCK_N, LAYOUT, STORED, SMALL, X_STEP, W_STEP, OUT_STEP,
    )  # fmt: skip
    if EXTRA_N > 0:
        _finish(
            more, top, second, M, N, x_scale, w_scale, bias, residual, residual_stride, out_scale,
            y, BLOCK_M, EXTRA_N, EXTRA_LAYOUT, EXTRA_STORED, SMALL, X_STEP, W_STEP, OUT_STEP,
        )  # fmt: skip
