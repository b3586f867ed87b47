"""Attention over a cache of keys and values.

A thread takes some tokens and the heads that share a cache, and goes through the rows of that by
blocks, which stay near the processor meanwhile.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ssmc import ops
from ssmc.kernels.cpu.launch import contiguous, empty, kernel, launch, run_torch
from ssmc.kernels.cpu.numbers import LOG2E, exp2
from ssmc.kernels.cpu.vectors import (
    ROWS,
    float32_rows_dot,
    float32_rows_sum,
    float32_rows_sum_64,
    int8_rows_dot,
    int8_rows_sum,
    int8_rows_sum_64,
)
from ssmc.kernels.cpu.words import (
    arguments_at,
    float32_at,
    float32_of_bits,
    float_of_bits,
    int8_at,
    int16_at,
    int32_at,
    int64_at,
)
from ssmc.ops.attention import check_attention

PAIRS = 16  # of a token and a head, at a time
BLOCK = 64  # rows of the cache at a time
F32 = np.float32
ZERO, ONE = F32(0), F32(1)


@njit
def _scales(address, wide, apart, count, out):
    """Numbers that lie `apart` elements from one another, float32 (wide) or bfloat16."""
    if wide:
        values = float32_at(address, (count - 1) * apart + 1)
        for i in range(count):
            out[i] = values[i * apart]
    else:
        halves = int16_at(address, (count - 1) * apart + 1)
        for i in range(count):
            out[i] = float32_of_bits(np.int32(halves[i * apart] << 16))


@njit(fastmath={"contract", "reassoc"})
def _float32_dots(q, n, rows, apart, count, out):
    """Products of q with rows of float32 that lie `apart` elements from one another."""
    blocks = n // 16
    for first in range(0, count, ROWS):
        size, start = min(ROWS, count - first), rows + 4 * first * apart
        float32_rows_dot(out + 4 * first, q, start, 4 * apart, size, blocks)
        if n % 16:
            rest, found = float32_at(q + 64 * blocks, n % 16), float32_at(out + 4 * first, size)
            for i in range(size):
                row = float32_at(start + 4 * i * apart + 64 * blocks, n % 16)
                for j in range(n % 16):
                    found[i] += rest[j] * row[j]


@njit(fastmath={"contract", "reassoc"})
def _int8_dots(q, n, rows, apart, count, out):
    """`_float32_dots` of rows of int8."""
    blocks = n // 16
    for first in range(0, count, ROWS):
        size, start = min(ROWS, count - first), rows + first * apart
        int8_rows_dot(out + 4 * first, q, start, apart, size, blocks)
        if n % 16:
            rest, found = float32_at(q + 64 * blocks, n % 16), float32_at(out + 4 * first, size)
            for i in range(size):
                row = int8_at(start + i * apart + 16 * blocks, n % 16)
                for j in range(n % 16):
                    found[i] += rest[j] * F32(row[j])


@njit
def _in_order(bits):
    """The bits of a float32 to an integer that is as large among such as the float among floats.

    And back.
    """
    return np.int32(bits ^ (np.int32(bits >> 31) & np.int32(0x7FFFFFFF)))


@njit
def _largest(x):
    """The largest of x, none of them NaN; as integers, of which a loop makes vectors."""
    words = int32_at(x.ctypes.data, len(x))
    largest = _in_order(words[0])
    for i in range(len(words)):
        largest = max(largest, _in_order(words[i]))
    return float32_of_bits(_in_order(largest))


@njit(fastmath={"contract", "reassoc"})
def _softmax(scores, scale):
    """exp(scale (s - the largest)) in place of each score s; 1 over their sum."""
    largest, factor, total = _largest(scores), scale * LOG2E, ZERO
    for i in range(len(scores)):
        scores[i] = exp2((scores[i] - largest) * factor)
    for i in range(len(scores)):
        total += scores[i]
    return ONE / total


@njit(fastmath={"contract"})
def _add_float32_rows(weights, rows, apart, y):
    """Add to y rows of float32, `apart` elements from one another, times their weights."""
    n, out, w, stride, count = len(y), y.ctypes.data, weights.ctypes.data, 4 * apart, len(weights)
    wide, whole = n // 64 * 64, n // 16 * 16
    for first in range(0, wide, 64):
        float32_rows_sum_64(out + 4 * first, w, rows + 4 * first, stride, count)
    for first in range(wide, whole, 16):
        float32_rows_sum(out + 4 * first, w, rows + 4 * first, stride, count)
    for t in range(count if whole < n else 0):
        row = float32_at(rows + stride * t, n)
        for i in range(whole, n):
            y[i] += weights[t] * row[i]


@njit(fastmath={"contract"})
def _add_int8_rows(weights, rows, apart, y):
    """`_add_float32_rows` of rows of int8."""
    n, out, w, count = len(y), y.ctypes.data, weights.ctypes.data, len(weights)
    wide, whole = n // 64 * 64, n // 16 * 16
    for first in range(0, wide, 64):
        int8_rows_sum_64(out + 4 * first, w, rows + first, apart, count)
    for first in range(wide, whole, 16):
        int8_rows_sum(out + 4 * first, w, rows + first, apart, count)
    for t in range(count if whole < n else 0):
        row = int8_at(rows + apart * t, n)
        for i in range(whole, n):
            y[i] += weights[t] * F32(row[i])


@njit
def _multiply(values, scales):
    for i in range(len(values)):
        values[i] *= scales[i]


@njit
def _place(head, pair, a):
    """Which of all tokens' heads a pair is, the first being `head`."""
    heads, shared = a[10], a[15]
    return head + pair // shared * heads + pair % shared


@njit
def _score(first, head, seen, a, scores, scales):
    """The products of queries with the keys they see; those of int8 times their scales."""
    q, k, k_scale, groups, n = a[0], a[1], a[2], a[12], a[13]
    apart = groups * n
    for row in range(0, seen.max(), BLOCK):  # a block of keys is near for all pairs
        for pair in range(len(seen)):
            rows = min(BLOCK, seen[pair] - row)
            if rows <= 0:
                continue
            query, found = q + 4 * _place(head, pair, a) * n, scores[pair, row : row + rows]
            keys, out = first * n + row * apart, found.ctypes.data
            if k_scale:
                _int8_dots(query, n, k + keys, apart, rows, out)
                _multiply(found, scales[row : row + rows])
            else:
                _float32_dots(query, n, k + 4 * keys, apart, rows, out)


@njit
def _mix(first, head, seen, a, scores, share_of):
    """The sums of the values that tokens see, times their weights."""
    v, v_scale, groups, n, out = a[3], a[4], a[12], a[14], a[16]
    apart = groups * n
    for row in range(0, seen.max(), BLOCK):
        for pair in range(len(seen)):
            rows = min(BLOCK, seen[pair] - row)
            if rows <= 0:
                continue
            weights, values = scores[pair, row : row + rows], first * n + row * apart
            y = float32_at(out + 4 * _place(head, pair, a) * n, n)
            if row == 0:
                for i in range(n):
                    y[i] = ZERO
            if v_scale:
                _add_int8_rows(weights, v + values, apart, y)
            else:
                _add_float32_rows(weights, v + 4 * values, apart, y)
    for pair in range(len(seen)):
        y = float32_at(out + 4 * _place(head, pair, a) * n, n)
        for i in range(n):
            y[i] *= share_of[pair]


@kernel()
def _attention(arguments, thread, threads):
    # q, k, k_scale, v, v_scale, their scales are float32, position, scale, B, L, H, T, G, P, V,
    # heads that go together, out
    a = arguments_at(arguments, 17)
    k_scale, v_scale, wide = a[2], a[4], a[5]
    batch, length, heads, room, groups = a[8], a[9], a[10], a[11], a[12]
    factor, starts = F32(float_of_bits(a[7])), int64_at(a[6], batch)
    shared, size = a[15], 4 if wide else 2
    most = max(1, PAIRS // shared)
    tiles, parts = (length + most - 1) // most, heads // shared
    scores, scales = np.empty((most * shared, room + ROWS), F32), np.empty(room, F32)
    share_of, seen = np.empty(most * shared, F32), np.empty(most * shared, np.int64)
    for unit in range(thread, batch * parts * tiles, threads):
        sequence, part, token = unit // tiles // parts, unit // tiles % parts, unit % tiles * most
        pairs = min(most, length - token) * shared
        for pair in range(pairs):
            seen[pair] = min(room, starts[sequence] + token + pair // shared + 1)
        first = sequence * room * groups + part * shared * groups // heads
        head = (sequence * length + token) * heads + part * shared
        if k_scale:
            _scales(k_scale + size * first, wide, groups, seen[pairs - 1], scales)
        _score(first, head, seen[:pairs], a, scores, scales)
        if k_scale:
            _scales(v_scale + size * first, wide, groups, seen[pairs - 1], scales)
        for pair in range(pairs):
            weights = scores[pair, : seen[pair]]
            share_of[pair] = _softmax(weights, factor)
            if v_scale:
                _multiply(weights, scales[: seen[pair]])
        _mix(first, head, seen[:pairs], a, scores, share_of)


def attention(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, scale: float | None = None
) -> Tensor:
    """As ssmc::attention: q [B, L, H, P], k [B, T, G, P], v [B, T, G, V] -> [B, L, H, V]."""
    check_attention("attention", q, k, v, position)
    if any(x.dtype != torch.float32 for x in (q, k, v)):
        return run_torch(ops.attention, q, k, v, position, scale)
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
    """As ssmc::int8_attention: `attention` over int8 k_q and v_q."""
    check_attention("int8_attention", q, k_q, v_q, position)
    one_type = k_scale.dtype == v_scale.dtype
    if not one_type or not _fits(k_q, k_scale) or not _fits(v_q, v_scale):
        return run_torch(ops.int8_attention, q, k_q, k_scale, v_q, v_scale, position, scale)
    return _attend(q, k_q, k_scale, v_q, v_scale, position, scale)


def _fits(cache: Tensor, scale: Tensor) -> bool:
    """Whether a cache has a scale for each row and head."""
    return scale.shape == (*cache.shape[:3], 1) and scale.dtype in (torch.float32, torch.bfloat16)


def _attend(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor | None,
    v: Tensor,
    v_scale: Tensor | None,
    position: Tensor,
    scale: float | None,
) -> Tensor:
    batch, length, heads, n = q.shape
    room, groups, out_n = *k.shape[1:3], v.shape[-1]
    scales = [None if s is None else contiguous(s) for s in (k_scale, v_scale)]
    out = empty((batch, length, heads, out_n))
    launch(
        _attention, contiguous(q), contiguous(k), scales[0], contiguous(v), scales[1],
        int(k_scale is not None and k_scale.dtype == torch.float32), contiguous(position),
        float(1 / math.sqrt(n) if scale is None else scale), batch, length, heads, room, groups, n,
        out_n, _shared(batch * length, heads, groups), out,
        work=q.shape[:3].numel() * room * (n + out_n) // 8,
    )  # fmt: skip
    return out


def _shared(tokens: int, heads: int, groups: int) -> int:
    """How many heads go together: all that share a cache, unless too few threads had work then."""
    return heads // groups if tokens * groups >= torch.get_num_threads() else 1
