"""The int8 product of a depth so small that a program keeps its part of the weight all the time.

Such a product is bound by what follows the sums. A program therefore stays with its columns, whose
weight and scales are loaded once and before the kernel in front has ended, and goes through tiles
of rows, of which the next ones are on their way while one is scaled and written.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ssmc.kernels.arithmetic import inverse_of
from ssmc.kernels.launch import await_inputs
from ssmc.kernels.tiles import load_tile, load_vector, rescale, store_result

DEEPEST = 256  # of a product for which this is meant
_BLOCK_M = 64
_BLOCK_N = 128
_RESIDENT = 3  # programs that share a processor


def shape(m: int, n: int, k: int, count: int) -> tuple[tuple[int], dict[str, Any]]:
    """The grid for [m, k] by [n, k] on `count` processors, and the kernel's constants.

    The depth is taken as a power of two and, beside it, another for what is left.
    """
    tiles_m, tiles_n = triton.cdiv(m, _BLOCK_M), triton.cdiv(n, _BLOCK_N)
    rounds = triton.cdiv(tiles_m, max(1, _RESIDENT * count // max(1, tiles_n)))
    block_k = max(32, triton.next_power_of_2(k + 1) // 2)
    extra_k = 0 if k <= block_k else max(32, triton.next_power_of_2(k - block_k))
    constants = {
        "BLOCK_M": _BLOCK_M,
        "BLOCK_N": _BLOCK_N,
        "BLOCK_K": block_k,
        "EXTRA_K": extra_k,
        "EVEN_K": k == block_k + extra_k,
        "num_warps": 4,
        "num_stages": 3,
    }
    return (tiles_n * triton.cdiv(tiles_m, max(1, rounds)),), constants


@triton.jit
def shallow_kernel(
    x,
    w,
    x_scale,
    w_scale,
    bias,
    residual,
    out_scale,
    y,
    M,
    N,
    K,
    x_stride,
    residual_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXTRA_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    X_STEP: tl.constexpr,
    W_STEP: tl.constexpr,
    OUT_STEP: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """What `_linear_kernel` of `ssmc.kernels.matmul` computes; x and w are pointers."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    left = tl.program_id(0) % tiles_n * BLOCK_N
    column = left + tl.arange(0, BLOCK_N)
    part = load_tile(w, left, 0, N, K, K, BLOCK_N, BLOCK_K, EVEN_K, False)
    if EXTRA_K > 0:
        more = load_tile(w, left, BLOCK_K, N, K, K, BLOCK_N, EXTRA_K, EVEN_K, False)
    w_factor = load_vector(w_scale, column, N, W_STEP)
    shift = None
    if bias is not None:
        shift = load_vector(bias, column, N, 1)
    inverse = None
    if out_scale is not None:
        inverse = inverse_of(load_vector(out_scale, column, N, OUT_STEP))
    await_inputs(CHAIN)
    first = tl.program_id(0) // tiles_n
    for tile in range(first, tl.cdiv(M, BLOCK_M), tl.num_programs(0) // tiles_n):
        top = tile * BLOCK_M
        row = top + tl.arange(0, BLOCK_M)
        x_factor = load_vector(x_scale, row, M, X_STEP)
        x_part = load_tile(x, top, 0, M, K, x_stride, BLOCK_M, BLOCK_K, EVEN_K, False)
        sums = tl.dot(x_part, tl.trans(part), out_dtype=tl.int32)
        if EXTRA_K > 0:
            x_more = load_tile(x, top, BLOCK_K, M, K, x_stride, BLOCK_M, EXTRA_K, EVEN_K, False)
            sums = tl.dot(x_more, tl.trans(more), sums, out_dtype=tl.int32)
        value = rescale(sums, x_factor, w_factor, shift, True)
        store_result(value, row, column, M, N, residual, residual_stride, inverse, y)
