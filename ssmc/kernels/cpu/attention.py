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
from ssmc.kernels.cpu.kernel import kernel
from ssmc.kernels.cpu.lanes import widen
from ssmc.kernels.cpu.launch import contiguous, empty, launch, run_torch
from ssmc.kernels.cpu.numbers import LOG2E, exp2
from ssmc.kernels.cpu.vectors import (
    ROWS,
    float32_rows_dot,
    float32_rows_sum,
    float32_rows_sum_64,
    float32_two_rows_sums,
    int8_rows_dot,
    int8_rows_sum,
    int8_rows_sum_64,
    int8_two_rows_sums,
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
    keep,
    scratch,
)
from ssmc.ops.attention import check_attention

PAIRS = 16  # of a token and a head, at a time
BLOCK = 64  # rows of the cache at a time
F32 = np.float32
ZERO, ONE = F32(0), F32(1)


@njit
def _scales(address, wide, apart, count, at):
    """Numbers that lie `apart` elements from one another, float32 (wide) or bfloat16."""
    out = float32_at(at, count)
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
def _add_float32_rows(weights, rows, apart, count, n, out):
    """Add to float32 [n] `count` rows, `apart` elements from one another, times their weights."""
    wide, whole = n // 64 * 64, n // 16 * 16
    for first in range(0, wide, 64):
        float32_rows_sum_64(out + 4 * first, weights, rows + 4 * first, 4 * apart, count)
    for first in range(wide, whole, 16):
        float32_rows_sum(out + 4 * first, weights, rows + 4 * first, 4 * apart, count)
    y, factors = float32_at(out, n), float32_at(weights, count)
    for t in range(count if whole < n else 0):
        row = float32_at(rows + 4 * apart * t, n)
        for i in range(whole, n):
            y[i] += factors[t] * row[i]


@njit(fastmath={"contract"})
def _add_int8_rows(weights, rows, apart, count, n, out):
    """`_add_float32_rows` of rows of int8."""
    wide, whole = n // 64 * 64, n // 16 * 16
    for first in range(0, wide, 64):
        int8_rows_sum_64(out + 4 * first, weights, rows + first, apart, count)
    for first in range(wide, whole, 16):
        int8_rows_sum(out + 4 * first, weights, rows + first, apart, count)
    y, factors = float32_at(out, n), float32_at(weights, count)
    for t in range(count if whole < n else 0):
        row = int8_at(rows + apart * t, n)
        for i in range(whole, n):
            y[i] += factors[t] * F32(row[i])


@njit
def _add_rows(weights, rows, apart, count, n, narrow, out):
    """To one result."""
    if narrow:
        _add_int8_rows(weights, rows, apart, count, n, out)
    else:
        _add_float32_rows(weights, rows, apart, count, n, out)


@njit
def _add_rows_twice(weights, weights_apart, rows, apart, count, n, narrow, out, out_apart):
    """To two results, n a multiple of 64; addresses of weights and results are that far apart."""
    for first in range(0, n, 64):
        place = out + 4 * first
        if narrow:
            int8_two_rows_sums(place, out_apart, weights, weights_apart, rows + first, apart, count)
        else:
            float32_two_rows_sums(
                place, out_apart, weights, weights_apart, rows + 4 * first, 4 * apart, count
            )


@njit
def _multiply(address, scales, count):
    values, factors = float32_at(address, count), float32_at(scales, count)
    for i in range(count):
        values[i] *= factors[i]


@njit
def _place(head, pair, a):
    """Which of all tokens' heads a pair is, the first being `head`."""
    heads, shared = a[10], a[15]
    return head + pair // shared * heads + pair % shared


@njit
def _widen_rows(rows, apart, count, n, out):
    """Rows of int8 to float32 without gaps."""
    for row in range(count):
        widen(out + 4 * n * row, rows + row * apart, n // ROWS)
        values, copied = int8_at(rows + row * apart, n), float32_at(out + 4 * n * row, n)
        for i in range(n // ROWS * ROWS, n):
            copied[i] = F32(values[i])


@njit
def _score(first, head, pairs, a, room):
    """The products of queries with the keys they see; those of int8 times their scales."""
    q, k, k_scale, length, groups, n = a[0], a[1], a[2], a[11], a[12], a[13]
    seen, scores, scales, keys_room = room
    lengths, row_bytes = int64_at(seen, pairs), 4 * (length + ROWS)
    for row in range(0, lengths[pairs - 1], BLOCK):  # a block of keys is near for all pairs
        place, apart, narrow = first * n + row * groups * n, groups * n, k_scale != 0
        keys = k + place if narrow else k + 4 * place
        if narrow and pairs > 2:
            _widen_rows(keys, apart, min(BLOCK, lengths[pairs - 1] - row), n, keys_room)
            keys, apart, narrow = keys_room, n, False
        for pair in range(pairs):
            rows = min(BLOCK, lengths[pair] - row)
            if rows <= 0:
                continue
            query, out = q + 4 * _place(head, pair, a) * n, scores + pair * row_bytes + 4 * row
            if narrow:
                _int8_dots(query, n, keys, apart, rows, out)
            else:
                _float32_dots(query, n, keys, apart, rows, out)
            if k_scale:
                _multiply(out, scales + 4 * row, rows)


@njit
def _mix(first, head, pairs, a, room, share_of):
    """The sums of the values that tokens see, times their weights."""
    v, v_scale, length, groups, n, out = a[3], a[4], a[11], a[12], a[14], a[16]
    seen, scores = room[0], room[1]
    lengths, row_bytes, apart = int64_at(seen, pairs), 4 * (length + ROWS), groups * n
    for pair in range(pairs):
        float32_at(out + 4 * _place(head, pair, a) * n, n)[:] = ZERO
    for row in range(0, lengths[pairs - 1], BLOCK):
        place = first * n + row * apart
        values = v + place if v_scale else v + 4 * place
        pair = 0
        while pair < pairs:
            rows, weights = min(BLOCK, lengths[pair] - row), scores + pair * row_bytes + 4 * row
            y, both = out + 4 * _place(head, pair, a) * n, False
            if n % 64 == 0 and pair + 1 < pairs and rows > 0:
                both = min(BLOCK, lengths[pair + 1] - row) == rows
            if both:
                next_y = out + 4 * _place(head, pair + 1, a) * n
                _add_rows_twice(weights, row_bytes, values, apart, rows, n, v_scale, y, next_y - y)
            elif rows > 0:
                _add_rows(weights, values, apart, rows, n, v_scale, y)
            pair += 2 if both else 1
    for pair in range(pairs):
        y = float32_at(out + 4 * _place(head, pair, a) * n, n)
        for i in range(n):
            y[i] *= share_of[pair]


@kernel()
def _attention(arguments, thread, threads):
    # q, k, k_scale, v, v_scale, their scales are float32, position, scale, B, L, H, T, G, P, V,
    # heads that go together, out
    a = arguments_at(arguments, 17)
    k_scale, v_scale, wide = a[2], a[4], a[5]
    batch, length, heads, tokens, groups = a[8], a[9], a[10], a[11], a[12]
    factor, starts = F32(float_of_bits(a[7])), int64_at(a[6], batch)
    shared, size = a[15], 4 if wide else 2
    most = min(length, max(1, PAIRS // shared))
    tiles, parts = (length + most - 1) // most, heads // shared
    row_bytes, keys_bytes = 4 * (tokens + ROWS), 4 * BLOCK * a[13] if k_scale else 0
    memory, scores = scratch((most * shared + 1) * row_bytes + 12 * most * shared + keys_bytes)
    keys = scores + most * shared * row_bytes
    scales = keys + keys_bytes
    seen = scales + row_bytes
    lengths, share_of = (
        int64_at(seen, most * shared),
        float32_at(seen + 8 * most * shared, most * shared),
    )
    room = (seen, scores, scales, keys)
    for unit in range(thread, batch * parts * tiles, threads):
        sequence, part, token = unit // tiles // parts, unit // tiles % parts, unit % tiles * most
        pairs = min(most, length - token) * shared
        for pair in range(pairs):
            lengths[pair] = min(tokens, starts[sequence] + token + pair // shared + 1)
        first = sequence * tokens * groups + part * shared * groups // heads
        head = (sequence * length + token) * heads + part * shared
        all_seen = lengths[pairs - 1]
        if k_scale:
            _scales(k_scale + size * first, wide, groups, all_seen, scales)
        _score(first, head, pairs, a, room)
        if k_scale:
            _scales(v_scale + size * first, wide, groups, all_seen, scales)
        for pair in range(pairs):
            weights = scores + pair * row_bytes
            share_of[pair] = _softmax(float32_at(weights, lengths[pair]), factor)
            if v_scale:
                _multiply(weights, scales, lengths[pair])
        _mix(first, head, pairs, a, room, share_of)
    keep(memory)


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
