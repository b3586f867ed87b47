"""Rotation by a Hadamard matrix: additions among the pieces of a row and inside each.

The matrix of a block is kron(P, S), P Paley's of order m and S Sylvester's of order 2^k. A row is
cut so that an index of P or a high bit of one of S is a number of a piece: along these the product
is additions of whole pieces. The low bits of S are butterflies inside a piece.
"""

# A tuple of pieces grows in a loop that Triton unrolls; it knows no starred expressions.
# ruff: noqa: RUF005, SIM108
# mypy: disable-error-code="assignment"

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels.launch import await_inputs, launch, let_next_load, row_view
from ssmc.kernels.pieces import load_pieces, stack, store_pieces, store_quantized, unstack
from ssmc.quant.rotation import _base_matrix, _factor, check_block

MAX_PIECES = 128
"""Most pieces of a row: each is code of its own, which takes time to compile."""
MAX_ORDER = 60
"""Largest Paley order: a product holds its pieces in registers twice, and compiling its code takes
minutes beyond."""
STACKED, FEW_STACKED = 2, 5
"""Up to four pieces are one tensor in a butterfly, and of few rows, which have shared memory and no
others to hide their barriers, up to 32."""

MANY_ROWS = 512
"""From here on rows, each with few warps, hide one another's latencies."""


def is_few(x: Tensor) -> bool:
    """Whether the rows of x leave processors idle."""
    return x.numel() < MANY_ROWS * x.shape[-1]


def warps_for(m: int, n: int, few: int) -> int:
    """Warps for one of m rows of n values: few where there are rows enough to fill a GPU."""
    wanted = few if m >= MANY_ROWS else 8
    return min(wanted, max(1, triton.next_power_of_2(n) // 512))


@dataclass(frozen=True)
class Rotation:
    """How kernels rotate a row by a block: in pieces of `width`, a power of two.

    `signs` has an integer for each row of the Paley matrix, bit j set where entry j is -1. A block
    is len(signs) * 2^doublings values; `inner` of the doublings are inside a piece. In the
    butterflies up to 2^stacked pieces are one tensor: the longer it is, the less do threads
    exchange.
    """

    signs: tuple[int, ...]
    doublings: int
    inner: int
    width: int
    stacked: int
    factor: float

    def constants(self) -> dict[str, Any]:
        """The compile-time arguments of a kernel that calls `rotate_pieces`."""
        return {
            "WIDTH": self.width,
            "SIGNS": self.signs,
            "DOUBLINGS": self.doublings,
            "INNER": self.inner,
            "STACKED": self.stacked,
            "FACTOR": self.factor,
        }


@functools.lru_cache
def plan(n: int, block: int, width: int = 256, few: bool = False) -> Rotation | None:
    """The rotation of `few` rows of n, in pieces of at most `width`; None where kernels have none.

    These take a Paley order of at most 60 and 128 pieces a row. Raises as `check_block`.
    """
    check_block(n, block)
    order, doublings = _factor(block)
    width = min(width, triton.next_power_of_2(n) if order == 1 else 2**doublings)
    if order > MAX_ORDER or n > width * MAX_PIECES:
        return None
    negative = (_base_matrix(order) < 0).tolist()
    signs = tuple(sum(bit << j for j, bit in enumerate(row)) for row in negative)
    inner = min(doublings, width.bit_length() - 1)
    stacked = min(FEW_STACKED if few else STACKED, triton.cdiv(n, width).bit_length() - 1)
    return Rotation(signs, doublings, inner, width, stacked, 1 / math.sqrt(block))


@triton.jit
def _signed_sums(a, b, c, d):  # noqa: ANN202
    """a +- b +- c +- d: bits 0, 1, 2 of the index are the signs of b, c, d (set: minus)."""
    ab, a_b, cd, c_d = a + b, a - b, c + d, c - d
    return ab + cd, a_b + cd, ab - c_d, a_b - c_d, ab + c_d, a_b + c_d, ab - cd, a_b - cd


@triton.jit
def _paley(x, SIGNS: tl.constexpr):  # noqa: ANN202
    """The Paley matrix times the tuple x: 140 additions for order 20, instead of 380.

    Four entries of x have, up to a sign, only eight sums; each row of the matrix takes one.
    """
    y = ()
    for g in tl.static_range(0, len(x), 4):
        sums = _signed_sums(x[g], x[g + 1], x[g + 2], x[g + 3])
        added = ()
        for i in tl.static_range(len(x)):
            if (SIGNS[i] >> g) & 1:
                term = -sums[((SIGNS[i] >> (g + 1)) & 7) ^ 7]
            else:
                term = sums[(SIGNS[i] >> (g + 1)) & 7]
            if g == 0:
                added = added + (term,)
            else:
                added = added + (y[i] + term,)
        y = added
    return y


@triton.jit
def _butterfly_across(x, STEPS: tl.constexpr):  # noqa: ANN202
    """Sylvester's matrix times the tuple x of 2^STEPS tensors."""
    for step in tl.static_range(STEPS):
        y = ()
        for i in tl.static_range(len(x)):
            if (i >> step) & 1:
                y = y + (x[i ^ (1 << step)] - x[i],)
            else:
                y = y + (x[i] + x[i ^ (1 << step)],)
        x = y
    return x


@triton.jit
def _butterfly_inside(x, FIRST: tl.constexpr, STEPS: tl.constexpr):  # noqa: ANN202
    """A butterfly in x along bits FIRST to FIRST + STEPS - 1 of the place of a value."""
    width: tl.constexpr = x.shape[0]
    for step in tl.static_range(FIRST, FIRST + STEPS):
        pairs = tl.reshape(x, [width >> (step + 1), 2, 1 << step])
        a, b = tl.split(tl.permute(pairs, (0, 2, 1)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), [width])
    return x


@triton.jit
def rotate_pieces(
    pieces,
    SIGNS: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    INNER: tl.constexpr,
    STACKED: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """`ssmc.ops.hadamard` of a row in the pieces that a `Rotation` says."""
    ORDER: tl.constexpr = len(SIGNS)
    OUTER: tl.constexpr = DOUBLINGS - INNER
    SPAN: tl.constexpr = 1 << OUTER  # pieces that one entry of the Paley matrix multiplies
    rotated = ()
    for first in tl.static_range(0, len(pieces), ORDER * SPAN):
        products = ()
        for t in tl.static_range(SPAN):
            x = ()
            for i in tl.static_range(ORDER):
                x = x + (pieces[first + i * SPAN + t],)
            if ORDER > 1:
                x = _paley(x, SIGNS)
            products = products + x
        for i in tl.static_range(ORDER):
            x = ()
            for t in tl.static_range(SPAN):
                x = x + (products[t * ORDER + i],)
            rotated = rotated + _butterfly_across(x, OUTER)
    result = ()
    LOGS: tl.constexpr = stacks_of(len(rotated), STACKED)
    for i in tl.static_range(len(LOGS)):
        result = result + _butterflies(rotated, len(result), LOGS[i], INNER, FACTOR)
    return result


@triton.constexpr_function
def stacks_of(count, most):
    """`count` as powers of two, at most 2^most and the largest first: their logarithms."""
    logs = []
    while count > 0:
        logs.append(min(most, count.bit_length() - 1))
        count -= 1 << logs[-1]
    return logs


@triton.jit
def _butterflies(  # noqa: ANN202
    pieces,
    FIRST: tl.constexpr,
    LOG: tl.constexpr,
    INNER: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """The butterflies inside 2^LOG pieces from FIRST on, as one tensor, times FACTOR."""
    x = ()
    for i in tl.static_range(1 << LOG):
        x = x + (pieces[FIRST + i],)
    x = _butterfly_inside(stack(x, LOG), LOG, INNER)
    return unstack(x * FACTOR, LOG)


@triton.jit
def _kernel(  # noqa: ANN202
    x,
    x_stride,
    out,
    scale,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    SIGNS: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    INNER: tl.constexpr,
    STACKED: tl.constexpr,
    FACTOR: tl.constexpr,
    QUANTIZE: tl.constexpr,
    CHAIN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    let_next_load(CHAIN)
    await_inputs(CHAIN)
    pieces = load_pieces(x + row * x_stride, N, WIDTH)
    pieces = rotate_pieces(pieces, SIGNS, DOUBLINGS, INNER, STACKED, FACTOR)
    if QUANTIZE:
        store_quantized(out + row * N, scale + row, pieces, N, WIDTH)
    else:
        store_pieces(out + row * N, pieces, N, WIDTH)


def _run(
    x: Tensor, out: Tensor, scale: Tensor | None, rotation: Rotation, num_warps: int | None
) -> None:
    flat = row_view(x)
    m, n = flat.shape
    launch(
        _kernel,
        (m,),
        flat,
        flat.stride(0),
        out,
        scale,
        device=x.device,
        N=n,
        **rotation.constants(),
        QUANTIZE=scale is not None,
        num_warps=num_warps or warps_for(m, n, few=1),
    )


def hadamard(x: Tensor, block: int, *, width: int = 256, num_warps: int | None = None) -> Tensor:
    """Kernel of `ssmc.ops.hadamard`, whose own definition runs where `plan` finds no rotation."""
    rotation = plan(x.shape[-1], block, width, is_few(x))
    if rotation is None:
        return torch.ops.ssmc.hadamard(x, block)
    out = torch.empty(x.shape, device=x.device)
    _run(x, out, None, rotation, num_warps)
    return out


def hadamard_quantize(
    x: Tensor, block: int, *, width: int = 256, num_warps: int | None = None
) -> tuple[Tensor, Tensor]:
    """Kernel of `ssmc.ops.hadamard_quantize`; its definition runs where `plan` is None."""
    rotation = plan(x.shape[-1], block, width, is_few(x))
    if rotation is None:
        return torch.ops.ssmc.hadamard_quantize(x, block)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), device=x.device)
    _run(x, q, scale, rotation, num_warps)
    return q, scale
