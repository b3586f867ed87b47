"""What matrix products share: how they are cut into tiles, and loading and storing one."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ssmc.kernels.arithmetic import times_scale, to_int8
from ssmc.kernels.launch import row_view

_EXACT = 1 << 24  # below it every integer is a float32


@dataclass(frozen=True)
class Tiling:
    """How a product is cut up: launch parameters, none of which changes a bit of the result.

    `descriptors` lets the copy engine (TMA) load the tiles, where addresses and strides are
    multiples of 16 bytes. `asynchronous` takes the kernel of `ssmc.kernels.matmul_hopper` where it
    can run (64 rows of the tile for each 4 warps, on Hopper, aligned as above), `persistent` that
    of `ssmc.kernels.matmul_persistent` (128 rows). `group` tiles of rows share a tile of the weight
    in the cache. The depth is divided into `shares`, which a second kernel adds up.
    """

    block_m: int = 128
    block_n: int = 128
    extra_n: int = 0
    block_k: int = 128
    warps: int = 4
    stages: int = 3
    group: int = 8
    descriptors: bool = False
    asynchronous: bool = False
    persistent: bool = False
    shares: int = 1

    @property
    def width(self) -> int:
        """Columns of the result that one program makes."""
        return self.block_n + self.extra_n


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


@dataclass(frozen=True)
class Operands:
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
    def small(self) -> bool:
        """Whether every sum is a float32."""
        return self.x.shape[1] * 128 * 128 <= _EXACT

    @property
    def aligned(self) -> bool:
        """Whether the copy engine can load both matrices."""
        m, n, k = self.sizes
        addresses = (self.x.data_ptr(), self.w.data_ptr(), self.x.stride(0), self.w.stride(0))
        return min(m, n, k) > 0 and all(value % 16 == 0 for value in addresses)


def operands_of(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None
) -> Operands:
    """The operands of `ssmc.ops.int8_linear`, in two dimensions."""
    return Operands(
        row_view(x_q),
        row_scale(x_scale, x_q),
        w_q.contiguous(),
        w_scale.reshape(-1),
        None if bias is None else bias.contiguous(),
    )


def loads(operands: Operands, how: Tiling) -> tuple[Any, Any, Any]:
    """What the tiles of x and of both parts of w are loaded through."""
    x, w = operands.x, operands.w
    if not (how.descriptors and operands.aligned):
        return x, w, w
    block = how.block_k
    return (
        TensorDescriptor.from_tensor(x, [how.block_m, block]),
        TensorDescriptor.from_tensor(w, [how.block_n, block]),
        TensorDescriptor.from_tensor(w, [how.extra_n or how.block_n, block]),
    )


def meta(operands: Operands, how: Tiling) -> dict[str, Any]:
    """What the kernels share beside that, by name."""
    k = operands.sizes[2]
    return {
        "x_stride": operands.x.stride(0),
        "BLOCK_M": how.block_m,
        "BLOCK_N": how.block_n,
        "EXTRA_N": how.extra_n,
        "BLOCK_K": how.block_k,
        "EVEN_K": k % how.block_k == 0,
        "DESCRIPTORS": how.descriptors and operands.aligned,
        "num_warps": how.warps,
        "num_stages": how.stages,
    }


def loop_clocks(height: int, parts: tuple[int, int]) -> float:
    """Clocks a processor needs for a column of the depth of a tile, of such parts of its columns.

    The copy engine brings 48 bytes a clock. Shared memory moves 128: what is copied, and for each
    instruction, of 64 rows and at most 128 columns, both operands.
    """
    width = sum(parts)
    read = height / 64 * sum(64 * -(-part // 128) + part for part in parts)
    return max((height + width) / 48, (height + width + read) / 128)


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a program's tile: GROUP rows of tiles go through all columns together."""
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inside = program % (GROUP * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def load_tile(
    source,
    row,
    start,
    count,
    K,
    stride,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Rows row .. row + ROWS of a matrix [count, K], columns from start; 0 from column K on.

    What stands for rows that do not exist is no matter: their results are not stored.
    """
    if DESCRIPTORS:
        tile = source.load([row, start])
    else:
        line = tl.minimum(row + tl.arange(0, ROWS), count - 1).to(tl.int64)
        column = start + tl.arange(0, BLOCK_K)
        address = source + line[:, None] * stride + column[None, :]
        tile = tl.load(address) if EVEN_K else tl.load(address, mask=column[None, :] < K, other=0)
    return tile


@triton.jit
def load_vector(source, index, count, STEP: tl.constexpr):
    """The values at `index` of a vector of `count`, or of a single one for all (STEP 0)."""
    return tl.load(source + index * STEP, mask=index < count, other=1.0)


@triton.jit
def rescale(sums, x_factor, w_factor, shift, SMALL: tl.constexpr):
    """The float32 result [rows, columns] of int32 sums: scaled, then `shift` added if there is one.

    x_factor holds a value a row, w_factor and shift a value a column. SMALL says that every sum is
    a float32.
    """
    scale = x_factor[:, None] * w_factor[None, :]
    value = sums.to(tl.float32) * scale if SMALL else times_scale(sums, scale)
    if shift is not None:
        value += shift[None, :]
    return value


@triton.jit
def store_result(value, row, column, M, N, residual, residual_stride, inverse, y):
    """Write a float32 tile: as it is, added to the residual, or rounded to int8.

    `inverse` is None, or holds 1 / scale of the int8 result for each column.
    """
    inside = (row < M)[:, None] & (column < N)[None, :]
    line = row.to(tl.int64)
    if residual is not None:
        address = residual + line[:, None] * residual_stride + column[None, :]
        value = tl.load(address, mask=inside, other=0.0) + value
    address = y + line[:, None] * N + column[None, :]
    if inverse is not None:
        tl.store(address, to_int8(value, inverse[None, :]), mask=inside)
    else:
        tl.store(address, value, mask=inside)
