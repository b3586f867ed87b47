"""What a chunk of the Mamba-2 scan needs before its state is known, and all segments share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels.arithmetic import LOG2E
from ssmc.kernels.launch import await_inputs, launch
from ssmc.kernels.ssd_operands import (
    SMALL,
    chunk_weights,
    int8_rows,
    of_head,
    positions,
    step_sizes,
)

_TOGETHER = 4  # chunks of a program that makes weights, a warp each


@dataclass(frozen=True)
class Chunks:
    """Of chunks of T positions.

    weights [B H, L / T, 4, T] and sizes [2, B H, L / T] are those of `_weights_kernel`, between
    [B G, L / T, T, T] and C_sizes [B G, L / T] those of `_between_kernel`; copies [B G, L / T, 2,
    T, N] are B and C as float16 integers in the order of the scan, zeros behind the end, or None.
    """

    weights: Tensor
    sizes: Tensor
    between: Tensor
    C_sizes: Tensor
    copies: Tensor | None


@triton.jit
def _weights_kernel(
    x,
    dt,
    B,
    C,
    A,
    dt_bias,
    limits,
    weights,
    sizes,
    length,
    heads,
    group_size,
    width,
    rank,
    REVERSE: tl.constexpr,
    X_FORM: tl.constexpr,
    B_FORM: tl.constexpr,
    C_FORM: tl.constexpr,
    CHUNK: tl.constexpr,
    TOGETHER: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    CHAIN: tl.constexpr,
) -> None:
    """TOGETHER chunks of one head.

    The weights are those of `chunk_weights` and how C reads the state in front of the chunk, its
    scale included; the sizes are `whole` and `largest`.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = tl.num_programs(0).to(tl.int64)
    batch, head = row // heads, row % heads
    group = head // group_size
    chunks = tl.cdiv(length, CHUNK)
    start, position, valid = positions(block, length, REVERSE, TOGETHER * CHUNK)
    x_at, dt_at = of_head(x, batch, head, start), of_head(dt, batch, head, start)
    B_at, C_at = of_head(B, batch, group, start), of_head(C, batch, group, start)
    rate = tl.load(A + head) * LOG2E
    bias = 0.0 if dt_bias is None else tl.load(dt_bias + head)
    step = step_sizes(dt_at[0], dt_at[1], dt, bias, limits, position, valid)
    _, x_factor = int8_rows(x_at[0], x_at[1], x, position, valid, width, WIDTH, X_FORM)
    _, B_factor = int8_rows(B_at[0], B_at[1], B, position, valid, rank, RANK, B_FORM)
    _, C_factor = int8_rows(C_at[0], C_at[1], C, position, valid, rank, RANK, C_FORM)
    step = tl.reshape(step, [TOGETHER, CHUNK])
    factor = tl.reshape(x_factor * B_factor, [TOGETHER, CHUNK])
    since, within, until_end, whole, largest = chunk_weights(step, rate, factor)
    reading = tl.reshape(C_factor, [TOGETHER, CHUNK]) * tl.exp2(since)
    await_inputs(CHAIN)
    chunk, s = block * TOGETHER + tl.arange(0, TOGETHER), tl.arange(0, CHUNK)
    here = row * chunks + chunk
    inside = (chunk < chunks)[:, None] & (s < CHUNK)[None, :]
    weights += here[:, None] * (4 * CHUNK) + s[None, :]
    tl.store(weights, since, inside)
    tl.store(weights + CHUNK, within, inside)
    tl.store(weights + 2 * CHUNK, until_end, inside)
    tl.store(weights + 3 * CHUNK, reading, inside)
    tl.store(sizes + here, whole, chunk < chunks)
    tl.store(sizes + rows * chunks + here, largest, chunk < chunks)


@triton.jit
def _between_kernel(
    B,
    C,
    between,
    C_sizes,
    copies,
    length,
    groups,
    rank,
    REVERSE: tl.constexpr,
    B_FORM: tl.constexpr,
    C_FORM: tl.constexpr,
    CHUNK: tl.constexpr,
    RANK: tl.constexpr,
    CHAIN: tl.constexpr,
) -> None:
    """C B' of a chunk of one group, as float16, where s does not come behind t.

    Times 2 / RANK and the scales of C over C_sizes, the largest of them.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunks = tl.num_programs(1)
    batch, group = row // groups, row % groups
    s, n = tl.arange(0, CHUNK), tl.arange(0, RANK)
    start, position, valid = positions(chunk, length, REVERSE, CHUNK)
    B_at, C_at = of_head(B, batch, group, start), of_head(C, batch, group, start)
    await_inputs(CHAIN)
    B_t, _ = int8_rows(B_at[0], B_at[1], B, position, valid, rank, RANK, B_FORM)
    C_t, C_factor = int8_rows(C_at[0], C_at[1], C, position, valid, rank, RANK, C_FORM)
    largest = tl.maximum(tl.max(C_factor, 0), SMALL)
    # |C B'| is at most 127^2 RANK, so times 2 / RANK it is below half of the largest float16.
    products = tl.dot(C_t, tl.trans(B_t)) * (C_factor * (2.0 / RANK / largest))[:, None]
    products = tl.where(s[:, None] >= s[None, :], products, 0.0)
    here = row * chunks + chunk
    between += here * CHUNK * CHUNK
    tl.store(between + s[:, None] * CHUNK + s[None, :], products.to(tl.float16))
    tl.store(C_sizes + here, largest)
    if copies is not None:
        copies += here * (2 * CHUNK * RANK) + s[:, None] * RANK + n[None, :]
        tl.store(copies, B_t)
        tl.store(copies + CHUNK * RANK, C_t)


def prepare(
    x: tuple[Any, ...],
    dt: tuple[Any, ...],
    B: tuple[Any, ...],
    C: tuple[Any, ...],
    A: Tensor,
    dt_bias: Tensor | None,
    limits: tuple[float, float],
    how: dict[str, Any],
    copied: bool,
) -> Chunks:
    """The chunks of operands as `operand` gives them; `copied` asks for copies of B and C.

    `how` holds REVERSE, CHUNK and of x the WIDTH, of B the RANK, both padded, and the forms of x,
    B and C.
    """
    batch, length, heads, width = x[0].shape
    groups, rank = B[0].shape[2:]
    rows, device = batch * heads, x[0].device
    chunk, RANK = how["CHUNK"], how["RANK"]
    chunks = triton.cdiv(length, chunk)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    half = torch.float16
    made = Chunks(
        weights=empty(rows, chunks, 4, chunk),
        sizes=empty(2, rows, chunks),
        between=empty(batch * groups, chunks, chunk, chunk, dtype=half),
        C_sizes=empty(batch * groups, chunks),
        copies=empty(batch * groups, chunks, 2, chunk, RANK, dtype=half) if copied else None,
    )
    launch(
        _between_kernel,
        (batch * groups, chunks),
        *(B, C, made.between, made.C_sizes, made.copies, length, groups, rank),
        device=device,
        num_warps=4,
        **{name: value for name, value in how.items() if name not in ("X_FORM", "WIDTH")},
    )
    launch(
        _weights_kernel,
        (rows, triton.cdiv(chunks, _TOGETHER)),
        *(x, dt, B, C, A, dt_bias, limits, made.weights, made.sizes),
        *(length, heads, heads // groups, width, rank),
        device=device,
        TOGETHER=_TOGETHER,
        num_warps=_TOGETHER,
        **how,
    )
    return made
