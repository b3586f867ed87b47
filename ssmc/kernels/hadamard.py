"""Rotation by a Hadamard matrix: additions of whole pieces of a row, none inside a piece.

The matrix of a block is kron(P, S), P Paley's of order m and S Sylvester's of order 2^k. A row is
cut so that an index of P or a high bit of one of S is a number of a piece: along these the product
is additions of pieces. Then a bundle of up to 16 pieces becomes one tensor, which is *turned*:
the bits of a value's place in it rotate, so that low bits of S become the number of a piece, for
additions again. A turn is one exchange through shared memory. When all bits of a piece have come
by, each piece has one place of every run of neighbours in the row.
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
from ssmc.kernels.pieces import (
    bundle_start,
    concatenated,
    load_pieces,
    pieces_of,
    store_pieces,
    store_quantized,
    turned,
)
from ssmc.quant.rotation import _base_matrix, _factor, check_block

MAX_PIECES = 128
"""Most pieces of a row: each is code of its own, which takes time to compile."""
MAX_ORDER = 60
"""Largest Paley order: a product holds its pieces in registers twice, and compiling its code takes
minutes beyond."""
LEAST_BUNDLED, MOST_BUNDLED = 2, 4
"""A bundle has 4 to 16 pieces: 16 bring the 8 bits of a piece of 256 by in two turns."""

MANY_ROWS = 512
"""From here on rows hide one another's latencies, and each had better take few instructions."""


def is_few(x: Tensor) -> bool:
    """Whether the rows of x leave processors idle."""
    return x.numel() < MANY_ROWS * x.shape[-1]


def warps_for(x: Tensor) -> int:
    """Warps for a row of x, at most 8: a thread has at most 20 values of few rows, 40 of many."""
    values = 32 * (20 if is_few(x) else 40)
    return min(8, triton.next_power_of_2(triton.cdiv(x.shape[-1], values)))


@dataclass(frozen=True)
class Rotation:
    """How kernels rotate a row by a block: in pieces of `width`, a power of two.

    `signs` has an integer for each row of the Paley matrix, bit j set where entry j is -1. A block
    is len(signs) * 2^doublings values; `inner` of the doublings are inside a piece. `bundles` has
    log2 of the pieces of each bundle.
    """

    signs: tuple[int, ...]
    doublings: int
    inner: int
    width: int
    bundles: tuple[int, ...]
    factor: float

    def constants(self) -> dict[str, Any]:
        """The compile-time arguments of a kernel that calls `rotate_pieces`."""
        return {
            "WIDTH": self.width,
            "SIGNS": self.signs,
            "DOUBLINGS": self.doublings,
            "INNER": self.inner,
            "BUNDLES": self.bundles,
            "FACTOR": self.factor,
        }


@functools.lru_cache
def plan(n: int, block: int, width: int = 256) -> Rotation | None:
    """The rotation of a row of n, in pieces of at most `width`; None where kernels have none.

    These take a Paley order of at most 60 and 128 pieces a row. Raises as `check_block`.
    """
    check_block(n, block)
    order, doublings = _factor(block)
    whole = triton.next_power_of_2(n) // 4  # of which a bundle has four
    width = min(width, max(1, whole) if order == 1 else 2**doublings)
    if order > MAX_ORDER or n > width * MAX_PIECES:
        return None
    negative = (_base_matrix(order) < 0).tolist()
    signs = tuple(sum(bit << j for j, bit in enumerate(row)) for row in negative)
    inner = min(doublings, width.bit_length() - 1)
    pieces = triton.cdiv(n, width)
    bundles = _bundles(pieces) if inner else (0,) * pieces
    return Rotation(signs, doublings, inner, width, bundles, 1 / math.sqrt(block))


def _bundles(pieces: int) -> tuple[int, ...]:
    """log2 of the pieces of the bundles that hold so many, at most a quarter of each empty."""
    logs: list[int] = []
    while pieces > 0:
        log = (pieces - 1).bit_length()
        if 4 * pieces < 3 * 2**log:
            log -= 1
        logs.append(min(MOST_BUNDLED, max(LEAST_BUNDLED, log)))
        pieces -= 1 << logs[-1]
    return tuple(logs)


@triton.constexpr_function
def turns_of(log, inner):
    """Turns of a bundle of 2^log pieces: as few as bring `inner` bits by."""
    return -(-inner // max(1, log))


@triton.constexpr_function
def bits_of(turn, log, inner):
    """How many of the inner bits a turn brings by, the high ones first."""
    return (inner + turn) // turns_of(log, inner)


@triton.constexpr_function
def rotated_by(turn, log, inner, width):
    """The bits that a turn rotates by: the first one skips those of a piece that are not inner."""
    skipped = width.bit_length() - 1 - inner if turn == 0 else 0
    return skipped + bits_of(turn, log, inner)


@triton.jit
def _signed_sums(a, b, c, d):
    """a +- b +- c +- d: bits 0, 1, 2 of the index are the signs of b, c, d (set: minus)."""
    ab, a_b, cd, c_d = a + b, a - b, c + d, c - d
    return ab + cd, a_b + cd, ab - c_d, a_b - c_d, ab + c_d, a_b + c_d, ab - cd, a_b - cd


@triton.jit
def _paley(x, SIGNS: tl.constexpr):
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
def _butterfly_across(x, STEPS: tl.constexpr):
    """Sylvester's matrix times each run of 2^STEPS tensors of the tuple x."""
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
def rotate_pieces(
    pieces,
    SIGNS: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    INNER: tl.constexpr,
    BUNDLES: tl.constexpr,
):
    """`ssmc.ops.hadamard` of a row times the root of the block, for the pieces of a `Rotation`.

    The result is in bundles, as `store_pieces` takes them.
    """
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
    for i in tl.static_range(len(BUNDLES)):
        result = result + _butterfly_inside(rotated, bundle_start(BUNDLES, i), BUNDLES[i], INNER)
    return result


@triton.jit
def _butterfly_inside(
    pieces,
    FIRST: tl.constexpr,
    LOG: tl.constexpr,
    INNER: tl.constexpr,
):
    """The butterflies inside the 2^LOG pieces from FIRST on, zeros where there are no more."""
    x = ()
    for i in tl.static_range(FIRST, FIRST + (1 << LOG)):
        if i < len(pieces):
            x = x + (pieces[i],)
        else:
            x = x + (tl.zeros_like(pieces[0]),)
    for turn in tl.static_range(turns_of(LOG, INNER)):
        rotated = turned(concatenated(x, LOG), rotated_by(turn, LOG, INNER, pieces[0].numel))
        x = _butterfly_across(pieces_of(rotated, LOG), bits_of(turn, LOG, INNER))
    return x


@triton.jit
def _kernel(
    x,
    x_stride,
    out,
    scale,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    SIGNS: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    INNER: tl.constexpr,
    BUNDLES: tl.constexpr,
    FACTOR: tl.constexpr,
    QUANTIZE: tl.constexpr,
    CHAIN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    let_next_load(CHAIN)
    await_inputs(CHAIN)
    pieces = load_pieces(x + row * x_stride, N, WIDTH)
    pieces = rotate_pieces(pieces, SIGNS, DOUBLINGS, INNER, BUNDLES)
    if QUANTIZE:
        store_quantized(out + row * N, scale + row, pieces, FACTOR, N, WIDTH, BUNDLES)
    else:
        y = ()
        for i in tl.static_range(len(pieces)):
            y = y + (pieces[i] * FACTOR,)
        store_pieces(out + row * N, y, N, WIDTH, BUNDLES)


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
        num_warps=num_warps or warps_for(x),
    )


def hadamard(x: Tensor, block: int, *, width: int = 256, num_warps: int | None = None) -> Tensor:
    """Kernel of `ssmc.ops.hadamard`, whose own definition runs where `plan` finds no rotation."""
    rotation = plan(x.shape[-1], block, width)
    if rotation is None:
        return torch.ops.ssmc.hadamard(x, block)
    out = torch.empty(x.shape, device=x.device)
    _run(x, out, None, rotation, num_warps)
    return out


def hadamard_quantize(
    x: Tensor, block: int, *, width: int = 256, num_warps: int | None = None
) -> tuple[Tensor, Tensor]:
    """Kernel of `ssmc.ops.hadamard_quantize`; its definition runs where `plan` is None."""
    rotation = plan(x.shape[-1], block, width)
    if rotation is None:
        return torch.ops.ssmc.hadamard_quantize(x, block)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), device=x.device)
    _run(x, q, scale, rotation, num_warps)
    return q, scale
