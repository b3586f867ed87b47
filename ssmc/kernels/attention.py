"""Attention over a cache: each head of keys with the heads of queries that it serves, by tiles.

A program holds a tile of queries, all heads of a group beside one another, and goes through the
rows of the cache up to the last that any of them sees, softmax on the way (Dao, 'FlashAttention-2',
arXiv 2307.08691, algorithm 1). Where there are few queries and many rows, several programs share
the rows and a second kernel joins what they found. How many rows there are is read on the device,
so a recorded call serves any length up to the room of the cache.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels.launch import INTERPRETED, await_inputs, launch
from ssmc.ops.attention import check_attention

ROWS = 64
"""Rows of the cache at a time."""
QUERIES = 64
"""Queries of a program, at most."""
SMALLEST = 16
"""The least that a matrix instruction takes in each dimension."""
PROGRAMS = 264
"""As many as keep a GPU busy: two for each of 132 processors."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, scale: float | None = None
) -> Tensor:
    """`ssmc.ops.attention` on a GPU."""
    check_attention("attention", q, k, v, position)
    return _attend(q, k, None, v, None, position, scale)


def int8_attention(
    q: Tensor,
    k_q: Tensor,
    k_scale: Tensor,
    v_q: Tensor,
    v_scale: Tensor,
    position: Tensor,
    scale: float | None = None,
) -> Tensor:
    """`ssmc.ops.int8_attention` on a GPU."""
    check_attention("int8_attention", q, k_q, v_q, position)
    return _attend(q, k_q, k_scale, v_q, v_scale, position, scale)


def _attend(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor | None,
    v: Tensor,
    v_scale: Tensor | None,
    position: Tensor,
    scale: float | None,
) -> Tensor:
    batch, length, heads, width = q.shape
    room, groups, out = *k.shape[1:3], v.shape[-1]
    shared = heads // groups
    block_m = max(SMALLEST, min(QUERIES, triton.next_power_of_2(length * shared)))
    tiles = -(-length * shared // block_m)
    parts = _parts(batch * groups * tiles, room)
    y = torch.empty((batch, length, heads, out), dtype=torch.float32, device=q.device)
    joined = (batch * groups, tiles * block_m, parts)
    found = y.new_empty((*joined, out)) if parts > 1 else y
    sums = y.new_empty((*joined, 2)) if parts > 1 else y
    q, k, v = (x.contiguous() for x in (q, k, v))
    grid = (tiles, batch * groups, parts)
    launch(
        attend_kernel, grid, q, k, k_scale, v, v_scale, position, y, found, sums,
        1 / math.sqrt(width) if scale is None else scale,
        length, room, groups, shared, width, out, parts,
        BLOCK_M=block_m, BLOCK_T=ROWS,
        BLOCK_P=_block(width), BLOCK_V=_block(out), SPLIT=parts > 1,
        PRECISION="ieee" if INTERPRETED else "tf32x3",
        device=q.device, num_warps=4, num_stages=2,
    )  # fmt: skip
    if parts > 1:
        launch(
            join_kernel, (batch * groups, length * shared), found, sums, y,
            length, groups, shared, out, parts, tiles * block_m,
            PARTS=triton.next_power_of_2(parts), BLOCK_V=_block(out),
            device=q.device, num_warps=1,
        )  # fmt: skip
    return y


def _block(width: int) -> int:
    return max(SMALLEST, triton.next_power_of_2(width))


def _parts(programs: int, room: int) -> int:
    """Into how many parts the rows go: as many as fill the GPU, of two tiles or more each."""
    return max(1, min(PROGRAMS // programs, room // (2 * ROWS), 64))


@triton.jit
def attend_kernel(
    q,
    k,
    k_scale,
    v,
    v_scale,
    position,
    y,
    found,
    sums,
    scale,
    L,
    T,
    G,
    SHARED,
    P,
    V,
    parts,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """One tile of queries of one group, over one part of the rows."""
    tile, pair, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = (pair // G).to(tl.int64), pair % G
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = m // SHARED, g * SHARED + m % SHARED
    inside = token < L
    p, c = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_V)
    await_inputs(CHAIN)
    start = tl.load(position + b)
    at = ((b * L + token) * (G * SHARED) + head)[:, None]
    queries = tl.load(q + at * P + p[None, :], mask=inside[:, None] & (p < P)[None, :], other=0.0)
    size = tl.maximum(tl.max(tl.abs(queries), 1), 1e-30)
    if k_scale is not None:
        queries /= size[:, None]  # float16 has little range: within it, all its bits
    seen = start + token
    last = start + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // SHARED, L - 1) + 1
    share = tl.cdiv(tl.cdiv(last, BLOCK_T), parts) * BLOCK_T
    begin, end = part * share, tl.minimum((part + 1) * share, last)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    result = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for first in range(begin, end, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        row = (b * T + t) * G + g
        there = t < end
        keys = tl.load(
            k + row[:, None] * P + p[None, :], mask=there[:, None] & (p < P)[None, :], other=0
        )
        if k_scale is not None:
            scores = dot_int8(queries, tl.trans(keys)) * size[:, None]
            scores *= tl.load(k_scale + row, mask=there, other=0).to(tl.float32)[None, :]
        else:
            scores = tl.dot(queries, tl.trans(keys.to(tl.float32)), input_precision=PRECISION)
        scores = tl.where(
            (t[None, :] <= seen[:, None]) & there[None, :], scores * scale, float("-inf")
        )
        larger = tl.maximum(largest, tl.max(scores, 1))
        finite = tl.where(larger == float("-inf"), 0.0, larger)  # a tile none of whose rows is seen
        before = tl.exp(largest - finite)
        weights = tl.exp(scores - finite[:, None])
        total = total * before + tl.sum(weights, 1)
        values = tl.load(
            v + row[:, None] * V + c[None, :], mask=there[:, None] & (c < V)[None, :], other=0
        )
        result *= before[:, None]
        if v_scale is not None:
            scales = tl.load(v_scale + row, mask=there, other=0).to(tl.float32)
            most = tl.maximum(tl.max(scales, 0), 1e-30)
            result += dot_int8(weights * (scales / most)[None, :], values) * most
        else:
            result += tl.dot(weights, values.to(tl.float32), input_precision=PRECISION)
        largest = larger
    if SPLIT:
        place = (pair.to(tl.int64) * tl.num_programs(0) * BLOCK_M + m) * parts + part
        tl.store(found + place[:, None] * V + c[None, :], result, mask=(c < V)[None, :])
        tl.store(sums + 2 * place, largest)
        tl.store(sums + 2 * place + 1, total)
    else:
        mask = inside[:, None] & (c < V)[None, :]
        tl.store(y + at * V + c[None, :], result / total[:, None], mask=mask)


@triton.jit
def dot_int8(x, q):
    """Floats within [-1, 1] times int8: each as two float16, to 2^-24; integers exactly."""
    q = q.to(tl.float16)
    high = x.to(tl.float16)
    low = (x - high.to(tl.float32)).to(tl.float16)
    return tl.dot(high, q) + tl.dot(low, q)


@triton.jit
def join_kernel(
    found,
    sums,
    y,
    L,
    G,
    SHARED,
    V,
    parts,
    M,
    PARTS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """One query: the parts of its rows, weighted by what each has summed up."""
    pair, m = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, c = tl.arange(0, PARTS), tl.arange(0, BLOCK_V)
    place = (pair * M + m) * parts + i
    there = i < parts
    await_inputs(CHAIN)
    largest = tl.load(sums + 2 * place, mask=there, other=float("-inf"))
    total = tl.load(sums + 2 * place + 1, mask=there, other=0.0)
    factor = tl.exp(largest - tl.max(largest, 0))
    mask = there[:, None] & (c < V)[None, :]
    values = tl.load(found + place[:, None] * V + c[None, :], mask=mask, other=0.0)
    result = tl.sum(values * factor[:, None], 0) / tl.sum(total * factor, 0)
    b, head = pair // G, (pair % G) * SHARED + m % SHARED
    at = (b * L + m // SHARED) * (G * SHARED) + head
    tl.store(y + at * V + c, result, mask=c < V)
