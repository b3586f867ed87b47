"""int8 matrix products of many rows, and what follows them on the accumulator.

One program makes one tile of the result, [block_m, block_n + extra_n]. Two parts side by side let a
tile be as wide as fills the processors evenly, since one part alone is a power of two: with 132
processors, 2048 x 2560 is 128 tiles of 128 x (256 + 64) but 160 of 128 x 256, two rounds.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ssmc.kernels import matmul_int4
from ssmc.kernels.arithmetic import inverse_of, scale_for, times_scale, to_int8
from ssmc.kernels.launch import await_inputs, launch, rows
from ssmc.kernels.prefetch import prefetch_rows

_EXACT = 1 << 24  # below it every integer is a float32


@dataclass(frozen=True)
class Tiling:
    """How a product is cut up: launch parameters, none of which changes a bit of the result.

    `descriptors` lets the copy engine (TMA) load the tiles, where addresses and strides are
    multiples of 16 bytes. `swap` computes the transposed tile, so that the weight takes the side of
    the tensor core's instruction that has 64 rows at least. `prefetch` asks for the weight before
    the kernel in front has ended. `group` tiles of rows share a tile of the weight in the cache.
    """

    block_m: int = 128
    block_n: int = 128
    extra_n: int = 0
    block_k: int = 128
    warps: int = 4
    stages: int = 3
    group: int = 8
    descriptors: bool = False
    swap: bool = False
    prefetch: bool = False

    @property
    def width(self) -> int:
        """Columns of the result that one program makes."""
        return self.block_n + self.extra_n


@dataclass(frozen=True)
class _Operands:
    """The operands of a product in two dimensions, as a kernel takes them."""

    x: Tensor
    x_scale: Tensor
    w: Tensor
    w_scale: Tensor
    bias: Tensor | None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows, columns and depth of the product."""
        return self.x.shape[0], self.w.shape[0], self.x.shape[1]

    @property
    def aligned(self) -> bool:
        """Whether the copy engine can load both matrices."""
        m, n, k = self.sizes
        addresses = (self.x.data_ptr(), self.w.data_ptr(), self.x.stride(0), self.w.stride(0))
        return min(m, n, k) > 0 and all(value % 16 == 0 for value in addresses)


def _operands(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None
) -> _Operands:
    return _Operands(
        flat(x_q),
        row_scale(x_scale, x_q),
        w_q.contiguous(),
        w_scale.reshape(-1),
        None if bias is None else bias.contiguous(),
    )


def flat(x: Tensor) -> Tensor:
    """x [..., C] as [rows, C] with channels next to one another; a view where that is possible."""
    return rows(x if x.stride(-1) == 1 else x.contiguous())


def row_scale(scale: Tensor, x: Tensor) -> Tensor:
    """A scale [] or [..., 1] of x [..., C] as [rows], or as [1] if one serves all rows."""
    if scale.numel() == 1:
        return scale.reshape(1)
    return scale.expand(*x.shape[:-1], 1).flatten()


def step(scale: Tensor) -> int:
    """The distance from one element of a scale to the next, 0 if there is but one."""
    return 0 if scale.numel() == 1 else scale.stride(0)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; off one, those of an H200."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


_WIDTHS = ((256, 64), (256, 0), (128, 32), (128, 0), (64, 16), (64, 0), (32, 0), (16, 0))


@functools.cache
def choose_tiling(m: int, n: int, k: int, count: int) -> Tiling:
    """The tiling of [m, k] by [n, k] that an estimate of its time on `count` processors favours.

    In clocks of one processor: a tile multiplies 4096 pairs a clock and loads 48 bytes; its start
    and end cost as much as 1500 of them, and each element of the result a tenth.
    """

    def cost(shape: tuple[int, tuple[int, int]]) -> float:
        height, width = shape[0], sum(shape[1])
        tiles = -(-m // height) * -(-n // width)
        loop = k * max(height * width / 4096, (height + width) / 48)
        return -(-tiles // count) * (loop + 1500 + height * width / 10)

    heights = [h for h in (16, 32, 64, 128) if h < 2 * m] or [16]
    height, (block_n, extra_n) = min(itertools.product(heights, _WIDTHS), key=cost)
    return _tiling(height, block_n, extra_n, k)


def _tiling(block_m: int, block_n: int, extra_n: int, k: int) -> Tiling:
    """A tiling of that shape, its pipeline as deep as shared memory allows."""
    narrow = block_m < 64
    block_k = 256 if block_m + block_n + extra_n <= 128 and k >= 1024 else 128 if k > 512 else 64
    stage = (block_m + block_n + extra_n) * block_k
    large = block_m * block_n >= 128 * 256
    room = 200_000 if large or narrow else 100_000
    return Tiling(
        block_m,
        block_n,
        extra_n,
        block_k,
        warps=8 if large else 4,
        stages=max(2, min(8, room // stage, -(-k // block_k))),
        descriptors=True,
        swap=narrow and block_n >= 64,
        prefetch=narrow or block_m * block_n <= 64 * 64,
    )


def int8_linear(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    tiling: Tiling | None = None,
) -> Tensor:
    """`ssmc.ops.int8_linear` on a GPU."""
    y = torch.empty((*x_q.shape[:-1], w_q.shape[0]), dtype=torch.float32, device=x_q.device)
    _product(x_q, x_scale, w_q, w_scale, bias, None, None, y, tiling)
    return y


def int8_linear_add(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    tiling: Tiling | None = None,
) -> Tensor:
    """`ssmc.ops.int8_linear_add` on a GPU."""
    y = torch.empty(residual.shape, dtype=torch.float32, device=x_q.device)
    _product(x_q, x_scale, w_q, w_scale, bias, flat(residual), None, y, tiling)
    return y


def int8_linear_quantize(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
    *,
    tiling: Tiling | None = None,
) -> Tensor:
    """`ssmc.ops.int8_linear_quantize` on a GPU."""
    y = torch.empty((*x_q.shape[:-1], w_q.shape[0]), dtype=torch.int8, device=x_q.device)
    _product(x_q, x_scale, w_q, w_scale, bias, None, out_scale.reshape(-1), y, tiling)
    return y


def _product(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    y: Tensor,
    tiling: Tiling | None,
) -> None:
    """Write the product, with what follows it, over y [..., N] (contiguous)."""
    if w_q.dtype == torch.uint8:
        matmul_int4.product(flat(x_q), row_scale(x_scale, x_q), w_q, w_scale, bias, residual, out_scale, y)
        return
    operands = _operands(x_q, x_scale, w_q, w_scale, bias)
    m, n, k = operands.sizes
    how = tiling or choose_tiling(m, n, k, processors(x_q.device))
    grid = (triton.cdiv(m, how.block_m) * triton.cdiv(n, how.width),)
    launch(
        _linear_kernel,
        grid,
        *_loads(operands, how),
        operands.x_scale,
        operands.w_scale,
        operands.bias,
        residual,
        out_scale,
        y,
        m,
        n,
        k,
        operands.x.stride(0),
        0 if residual is None else residual.stride(0),
        **_meta(operands, how),
        X_STEP=step(operands.x_scale),
        W_STEP=step(operands.w_scale),
        OUT_STEP=0 if out_scale is None else step(out_scale),
        GROUP=how.group,
        device=x_q.device,
    )


def _loads(operands: _Operands, how: Tiling) -> tuple[Any, Any, Any, Tensor]:
    """What the tiles are loaded through (x and both parts of w), and the weight itself."""
    x, w = operands.x, operands.w
    if not (how.descriptors and operands.aligned):
        return x, w, w, w
    block = how.block_k
    return (
        TensorDescriptor.from_tensor(x, [how.block_m, block]),
        TensorDescriptor.from_tensor(w, [how.block_n, block]),
        TensorDescriptor.from_tensor(w, [how.extra_n or how.block_n, block]),
        w,
    )


def _meta(operands: _Operands, how: Tiling) -> dict[str, Any]:
    """The constants that the kernels share."""
    k = operands.sizes[2]
    return {
        "BLOCK_M": how.block_m,
        "BLOCK_N": how.block_n,
        "EXTRA_N": how.extra_n,
        "BLOCK_K": how.block_k,
        "EVEN_K": k % how.block_k == 0,
        "SMALL": k * 128 * 128 <= _EXACT,
        "DESCRIPTORS": how.descriptors and operands.aligned,
        "SWAP": how.swap,
        "PREFETCH": how.prefetch and operands.aligned and k % 64 == 0,
        "num_warps": how.warps,
        "num_stages": how.stages,
    }


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):  # noqa: ANN001, ANN201
    """Row and column of a program's tile: GROUP rows of tiles go through all columns together."""
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inside = program % (GROUP * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def load_tile(  # noqa: ANN201
    source,  # noqa: ANN001
    row,  # noqa: ANN001
    start,  # noqa: ANN001
    count,  # noqa: ANN001
    K,  # noqa: ANN001
    stride,  # noqa: ANN001
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Rows row .. row + ROWS of a matrix [count, K], columns from start; 0 from column K on.

    What stands for rows that do not exist is no matter: their results are not stored.
    """
    if DESCRIPTORS:
        return source.load([row, start])
    line = tl.minimum(row + tl.arange(0, ROWS), count - 1).to(tl.int64)
    column = start + tl.arange(0, BLOCK_K)
    address = source + line[:, None] * stride + column[None, :]
    if EVEN_K:
        return tl.load(address)
    return tl.load(address, mask=column[None, :] < K, other=0)


@triton.jit
def multiply(x, w, accumulator, SWAP: tl.constexpr):  # noqa: ANN001, ANN201
    """accumulator + x @ w.T in int32; kept transposed with SWAP."""
    if SWAP:
        return tl.dot(w, tl.trans(x), accumulator, out_dtype=tl.int32)
    return tl.dot(x, tl.trans(w), accumulator, out_dtype=tl.int32)


@triton.jit
def zeros(M: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr, SWAP: tl.constexpr):  # noqa: ANN201
    """An accumulator for [M, N]."""
    if SWAP:
        return tl.zeros((N, M), DTYPE)
    return tl.zeros((M, N), DTYPE)


@triton.jit
def rescale(  # noqa: ANN201
    accumulator,  # noqa: ANN001
    row,  # noqa: ANN001
    column,  # noqa: ANN001
    M,  # noqa: ANN001
    N,  # noqa: ANN001
    x_scale,  # noqa: ANN001
    w_scale,  # noqa: ANN001
    bias,  # noqa: ANN001
    X_STEP: tl.constexpr,
    W_STEP: tl.constexpr,
    SMALL: tl.constexpr,
):
    """The float32 result [rows, columns] of int32 sums, of indices `row` and `column`."""
    x_factor = tl.load(x_scale + row * X_STEP, mask=row < M, other=1.0)
    w_factor = tl.load(w_scale + column * W_STEP, mask=column < N, other=1.0)
    scale = x_factor[:, None] * w_factor[None, :]
    if SMALL:
        y = accumulator.to(tl.float32) * scale
    else:
        y = times_scale(accumulator, scale)
    if bias is not None:
        y += tl.load(bias + column, mask=column < N, other=0.0)[None, :]
    return y


@triton.jit
def store_result(  # noqa: ANN201
    value,  # noqa: ANN001
    row,  # noqa: ANN001
    column,  # noqa: ANN001
    M,  # noqa: ANN001
    N,  # noqa: ANN001
    residual,  # noqa: ANN001
    residual_stride,  # noqa: ANN001
    out_scale,  # noqa: ANN001
    y,  # noqa: ANN001
    OUT_STEP: tl.constexpr,
):
    """Write a float32 tile: as it is, added to the residual, or rounded to int8."""
    inside = (row < M)[:, None] & (column < N)[None, :]
    line = row.to(tl.int64)
    if residual is not None:
        address = residual + line[:, None] * residual_stride + column[None, :]
        value = tl.load(address, mask=inside, other=0.0) + value
    address = y + line[:, None] * N + column[None, :]
    if out_scale is not None:
        scale = tl.load(out_scale + column * OUT_STEP, mask=column < N, other=1.0)
        tl.store(address, to_int8(value, inverse_of(scale)[None, :]), mask=inside)
    else:
        tl.store(address, value, mask=inside)


@triton.jit
def _linear_kernel(  # noqa: ANN202
    x_source,  # noqa: ANN001
    w_source,  # noqa: ANN001
    extra_source,  # noqa: ANN001
    w,  # noqa: ANN001
    x_scale,  # noqa: ANN001
    w_scale,  # noqa: ANN001
    bias,  # noqa: ANN001
    residual,  # noqa: ANN001
    out_scale,  # noqa: ANN001
    y,  # noqa: ANN001
    M,  # noqa: ANN001
    N,  # noqa: ANN001
    K,  # noqa: ANN001
    x_stride,  # noqa: ANN001
    residual_stride,  # noqa: ANN001
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXTRA_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SMALL: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SWAP: tl.constexpr,
    PREFETCH: tl.constexpr,
    X_STEP: tl.constexpr,
    W_STEP: tl.constexpr,
    OUT_STEP: tl.constexpr,
    GROUP: tl.constexpr,
    CHAIN: tl.constexpr,
):
    WIDTH: tl.constexpr = BLOCK_N + EXTRA_N
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, WIDTH), GROUP)
    first = tile_n * WIDTH
    second = first + BLOCK_N
    if PREFETCH:
        prefetch_rows(w, first, N, K, BLOCK_N, CHAIN)
        if EXTRA_N > 0:
            prefetch_rows(w, second, N, K, EXTRA_N, CHAIN)
    await_inputs(CHAIN)
    top = tile_m * BLOCK_M
    sums = zeros(BLOCK_M, BLOCK_N, tl.int32, SWAP)
    if EXTRA_N > 0:
        extra_sums = zeros(BLOCK_M, EXTRA_N, tl.int32, SWAP)
    for k in range(0, K, BLOCK_K):
        x = load_tile(x_source, top, k, M, K, x_stride, BLOCK_M, BLOCK_K, EVEN_K, DESCRIPTORS)
        part = load_tile(w_source, first, k, N, K, K, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS)
        if EXTRA_N > 0:
            more = load_tile(
                extra_source, second, k, N, K, K, EXTRA_N, BLOCK_K, EVEN_K, DESCRIPTORS
            )
            extra_sums = multiply(x, more, extra_sums, SWAP)
        sums = multiply(x, part, sums, SWAP)
    row = top + tl.arange(0, BLOCK_M)
    column = first + tl.arange(0, BLOCK_N)
    if SWAP:
        sums = tl.trans(sums)
    value = rescale(sums, row, column, M, N, x_scale, w_scale, bias, X_STEP, W_STEP, SMALL)
    store_result(value, row, column, M, N, residual, residual_stride, out_scale, y, OUT_STEP)
    if EXTRA_N > 0:
        column = second + tl.arange(0, EXTRA_N)
        if SWAP:
            extra_sums = tl.trans(extra_sums)
        value = rescale(
            extra_sums, row, column, M, N, x_scale, w_scale, bias, X_STEP, W_STEP, SMALL
        )
        store_result(value, row, column, M, N, residual, residual_stride, out_scale, y, OUT_STEP)
