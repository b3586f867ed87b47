"""int8 products of each token with the weights of the experts it has chosen, or their sum."""

from __future__ import annotations

from numba import njit
from torch import Tensor

from ssmc import ops
from ssmc.kernels.cpu.lanes import add_product, scaled_sums
from ssmc.kernels.cpu.launch import contiguous, empty, kernel, launch, rows, run_torch, vector
from ssmc.kernels.cpu.linear import add, copy_rows
from ssmc.kernels.cpu.products import rows_product
from ssmc.kernels.cpu.vectors import ROWS
from ssmc.kernels.cpu.words import arguments_at, float32_at, int64_at, keep, scratch, share


@njit
def _copy(values, count, out):
    """float32 [count] at an address to another."""
    given, copied = float32_at(values, count), float32_at(out, count)
    for i in range(count):
        copied[i] = given[i]


@kernel()
def _experts(arguments, thread, threads):
    (
        x, stride, x_scale, choices, each, w, w_scale, experts, n, k, index, count, weight,
        residual, apart_residual, out,
    ) = arguments_at(arguments, 16)  # fmt: skip
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
        result = float32_at(out + 4 * (row * n + begin), size)
        _copy(total if weight else y, size, out + 4 * (row * n + begin))
        if residual:
            add(float32_at(residual + 4 * (row * apart_residual + begin), size), result)
    keep(memory)


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
