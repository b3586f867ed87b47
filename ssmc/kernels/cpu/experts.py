"""int8 products of each token with the weights of the experts it has chosen, or their sum."""

from __future__ import annotations

from numba import njit
from torch import Tensor

from ssmc import ops
from ssmc.kernels.cpu.kernel import kernel
from ssmc.kernels.cpu.lanes import add_product, scaled_sums
from ssmc.kernels.cpu.launch import contiguous, empty, launch, rows, run_torch, vector
from ssmc.kernels.cpu.linear import (
    PANEL,
    add,
    column_parameters,
    copy_rows,
    finish,
    pack_panel,
    sum_of,
)
from ssmc.kernels.cpu.products import TILE_X, rows_product, tile_product
from ssmc.kernels.cpu.vectors import ROWS
from ssmc.kernels.cpu.words import arguments_at, float32_at, int8_at, int64_at, keep, scratch, share

STRIP = 1024  # choices that are sorted by expert at a time


@njit
def _copy(values, count, out):
    """float32 [count] at an address to another."""
    given, copied = float32_at(values, count), float32_at(out, count)
    for i in range(count):
        copied[i] = given[i]


@njit
def _few(a, thread, threads):
    """Each choice for itself: 16 rows of the weight of its expert as they are."""
    (
        x, stride, x_scale, choices, each, w, w_scale, experts, n, k, index, count, weight,
        residual, apart_residual, out,
    ) = a  # fmt: skip
    blocks, steps = (n + ROWS - 1) // ROWS, (k + 63) // 64
    wide, cells, summed = steps * 64, experts * n * k, choices if weight else 1
    room = 0 if k == wide else wide  # whole blocks are read where they are
    memory, sums = scratch(4 * ROWS * 4 + (1 + ROWS) * room)
    factors, y, total = sums + 4 * ROWS, sums + 8 * ROWS, sums + 12 * ROWS
    padded, whole = sums + 16 * ROWS, sums + 16 * ROWS + room
    chosen, tokens = int64_at(index, count), count // summed
    for unit in share(tokens * blocks, thread, threads):  # rows of a weight stay near for all
        row, begin = unit % tokens, unit // tokens * ROWS
        size = min(ROWS, n - begin)
        float32_at(total, ROWS)[:] = 0
        for choice in range(row * summed, (row + 1) * summed):
            token, first = choice if each else choice // choices, chosen[choice] * n + begin
            source, apart, values = w + first * k, k, x + token * stride
            if room:
                copy_rows(values, stride, 1, k, padded, wide)
                values = padded
            if (first + size - 1) * k + wide > cells:  # the weight would be read beyond its end
                copy_rows(source, k, size, k, whole, wide)
                source, apart = whole, wide
            rows_product(sums, values, source, apart, size, steps)
            _copy(w_scale + 4 * first, size, factors)
            scaled_sums(y, sums, 0, x_scale + 4 * token, factors, 1)
            if weight:
                add_product(total, y, weight + 4 * choice, 1)
        result = out + 4 * (row * n + begin)
        _copy(total if weight else y, size, result)
        if residual:
            added = float32_at(residual + 4 * (row * apart_residual + begin), size)
            add(added, float32_at(result, size))
    keep(memory)


@njit
def _sort(index, first, count, experts, order, ends):
    """The choices from `first` on by expert, in their order; where those of each expert end."""
    chosen, sorted_by = int64_at(index, first + count), int64_at(order, count)
    last = int64_at(ends, experts)
    last[:] = 0
    for i in range(count):
        last[chosen[first + i]] += 1
    for expert in range(1, experts):
        last[expert] += last[expert - 1]
    for i in range(count - 1, -1, -1):
        expert = chosen[first + i]
        last[expert] -= 1
        sorted_by[last[expert]] = first + i
    for expert in range(experts - 1):
        last[expert] = last[expert + 1]
    last[experts - 1] = count


@njit
def _add_up(results, first, count, panel, width, a, total):
    """What experts give for the choices from `first` on, summed over those of a token."""
    choices, n, weight, residual, apart_residual, out = a[3], a[8], a[12], a[13], a[14], a[15]
    for row in range(first // choices, (first + count) // choices):
        float32_at(total, PANEL)[:] = 0
        for choice in range(row * choices, (row + 1) * choices):
            value = results + 4 * PANEL * (choice - first)
            add_product(total, value, weight + 4 * choice, PANEL // ROWS)
        result = out + 4 * (row * n + panel)
        _copy(total, width, result)
        if residual:
            added = float32_at(residual + 4 * (row * apart_residual + panel), width)
            add(added, float32_at(result, width))


@njit
def _many(a, thread, threads):
    """Tiles of the tokens that have chosen an expert; threads share columns and choices."""
    x, stride, x_scale, choices, each, w, w_scale, experts, n, k, index, count, weight = a[:13]
    out, steps = a[15], (k + 3) // 4
    most = min(count, max(1, STRIP // choices) * choices)
    strips, panels = (count + most - 1) // most, (n + PANEL - 1) // PANEL
    panel_bytes, tile_bytes = (k // 64 + 1) * 64 * PANEL, 4 * TILE_X * PANEL
    memory, packed = scratch(
        panel_bytes + tile_bytes + 16 * PANEL + TILE_X * 4 * steps
        + (4 * PANEL * most if weight else 0) + 8 * (most + experts)
    )  # fmt: skip
    tile, columns = packed + panel_bytes, packed + panel_bytes + tile_bytes
    whole = columns + 16 * PANEL
    order = whole + TILE_X * 4 * steps
    ends, results = order + 8 * most, order + 8 * (most + experts)
    sorted_by, last = int64_at(order, most), int64_at(ends, experts)
    for unit in share(strips * panels, thread, threads):
        first, panel = unit // panels * most, unit % panels * PANEL
        here, width = min(most, count - first), min(PANEL, n - panel)
        _sort(index, first, here, experts, order, ends)
        begin = 0
        for expert in range(experts):
            end = last[expert]
            if begin < end:
                pack_panel(packed, w + expert * n * k, n, k, panel)
                scales = w_scale + 4 * (expert * n + panel)
                column_parameters(scales, 0, 0, width, PANEL, columns)
            for row in range(begin, end, TILE_X):
                rows = min(TILE_X, end - row)
                for r in range(rows):
                    choice = sorted_by[row + r]
                    token = choice if each else choice // choices
                    copy_rows(x + token * stride, 0, 1, k, whole + 4 * steps * r, 0)
                tile_product(tile, whole, 4 * steps, rows, packed, steps)
                for r in range(rows):
                    choice = sorted_by[row + r]
                    token = choice if each else choice // choices
                    excess = 128 * sum_of(int8_at(whole + 4 * steps * r, k))
                    place, wanted = out + 4 * (choice * n + panel), width
                    if weight:
                        place, wanted = results + 4 * PANEL * (choice - first), PANEL
                    sums, scale = tile + 4 * PANEL * r, x_scale + 4 * token
                    finish(sums, excess, scale, 0, 0, 0, wanted, PANEL, columns, place)
            begin = end
        if weight:
            _add_up(results, first, here, panel, width, a, columns + 12 * PANEL)
    keep(memory)


@kernel()
def _experts(arguments, thread, threads):
    # x, its stride and scales, choices of a token, whether x has a row for each; w, w_scale,
    # experts, N, K; index, how many; weights of the sum, residual, its stride; out
    a = arguments_at(arguments, 16)
    if a[11] < TILE_X * a[7]:
        _few(a, thread, threads)
    else:
        _many(a, thread, threads)


def int8_expert_linear(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, index: Tensor
) -> Tensor:
    """As ssmc::int8_expert_linear, bit for bit: float32 [B, L, k, N]."""
    if not _by_row(x_q, x_scale, w_q, w_scale):
        return run_torch(ops.int8_expert_linear, x_q, x_scale, w_q, w_scale, index)
    return _multiply(x_q, x_scale, w_q, w_scale, index)


def int8_expert_linear_sum(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    index: Tensor,
    weights: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    """As ssmc::int8_expert_linear_sum: float32 [B, L, N]."""
    if not _by_row(x_q, x_scale, w_q, w_scale):
        given = (x_q, x_scale, w_q, w_scale, index, weights, residual)
        return run_torch(ops.int8_expert_linear_sum, *given)
    return _multiply(x_q, x_scale, w_q, w_scale, index, weights, residual)


def _by_row(x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor) -> bool:
    """Whether scales are one for all, or one for each row of x and of the weights."""
    return all(
        s.numel() in (1, t.numel() // t.shape[-1]) for s, t in ((x_scale, x_q), (w_scale, w_q))
    )


def _multiply(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    index: Tensor,
    weights: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    experts, n, k = w_q.shape
    x, count, apart = rows(x_q)
    added, _, added_apart = (None, 0, 0) if residual is None else rows(residual)
    out = empty((*index.shape, n) if weights is None else (*index.shape[:2], n))
    launch(
        _experts, x, apart, vector(x_scale, count), index.shape[-1], int(x_q.dim() == 4),
        contiguous(w_q), vector(w_scale, experts * n), experts, n, k, contiguous(index),
        index.numel(), None if weights is None else contiguous(weights), added, added_apart, out,
        work=index.numel() * n * k // 8,
    )  # fmt: skip
    return out
