"""Hadamard matrices of order m * 2^k (Paley, Sylvester) and the fast product with them."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ssmc.errors import UsageError

CACHED_ELEMENTS = 2**18
"""Values rotated at a time: what a processor's second-level cache holds."""


class NoHadamard(UsageError, ValueError):
    """No construction known here gives a Hadamard matrix of the order asked for."""


def hadamard_matrix(n: int) -> Tensor:
    """The Hadamard matrix of order n: float32 [n, n], entries +-1, H @ H.T = n * identity.

    kron(P, S): P the smallest Paley matrix (order 1 for powers of two) whose order times a power
    of two is n, S the Sylvester matrix of that power. The same n always gives the same matrix.
    Raises NoHadamard naming n where there is no such P.
    """
    base, doublings = _factor(n)
    sylvester = _butterfly(torch.eye(2**doublings, device="cpu").unsqueeze(0))
    return torch.kron(_base_matrix(base), sylvester[0])


def largest_block(n: int) -> int:
    """The largest divisor of n (n >= 1) that `hadamard_matrix` knows, for a block diagonal."""
    return max(d for d in range(1, n + 1) if n % d == 0 and _base_order(d) is not None)


def check_block(width: int, block: int) -> None:
    """Raise NoHadamard where `block` is no known order, UsageError where it does not divide."""
    _factor(block)
    if width % block:
        raise UsageError(
            f"a Hadamard block of {block} does not divide a width of {width}",
            hint=f"the largest block that does is {largest_block(width)}",
        )


def base_factor(block: int) -> tuple[int, Tensor]:
    """The order m of the Paley matrix in `hadamard_matrix(block)`, and that matrix [m, m]."""
    base, _ = _factor(block)
    return base, _base_matrix(base)


def rotate(x: Tensor, block: int) -> Tensor:
    """H x / sqrt(block) for each run of `block` entries of the last dimension of x.

    H = hadamard_matrix(block), as a butterfly for the power of two and a sum in order for the
    Paley factor. Keeps x's shape, type and device. The bits of a row do not depend on the rows
    beside it. Raises as `check_block`.
    """
    check_block(x.shape[-1], block)
    rows = x.reshape(-1, block).split(max(1, CACHED_ELEMENTS // block))
    return torch.cat([_rotate_rows(part) for part in rows]).reshape(x.shape)


def _rotate_rows(rows: Tensor) -> Tensor:
    """H / sqrt(n) times each of the rows [R, n]; works on columns, where sums are contiguous."""
    n = rows.shape[1]
    base, doublings = _factor(n)
    columns = rows.T.clone(memory_format=torch.contiguous_format)
    _butterfly(columns.unflatten(0, (base, 2**doublings)))
    if base > 1:
        columns = _signed_sums(_base_matrix(base).to(rows), columns.view(base, -1)).view(n, -1)
    return columns.T * (1 / math.sqrt(n))


def _signed_sums(signs: Tensor, x: Tensor) -> Tensor:
    """signs [m, m], of +-1, times x [m, R], added up in the order of the rows of x.

    A matrix product sums in an order that depends on R; here multiplying is exact, so that only
    the order of the additions counts, and every column has the same.
    """
    total = torch.zeros_like(x)
    for sign, row in zip(signs.T, x, strict=True):
        total.addcmul_(sign.unsqueeze(1), row)
    return total


def _butterfly(x: Tensor) -> Tensor:
    """Sylvester's matrix times dimension 1 of x [m, 2^k, R], in place: Walsh-Hadamard transform."""
    half = 1
    while half < x.shape[1]:
        pairs = x.unflatten(1, (-1, 2, half))
        upper, lower = pairs.select(2, 0), pairs.select(2, 1)  # unbind's views have no gradient
        difference = upper - lower
        upper.add_(lower)
        lower.copy_(difference)
        half *= 2
    return x


def _factor(n: int) -> tuple[int, int]:
    """Split n into a Paley order and the exponent of the power of two that multiplies it."""
    base = _base_order(n)
    if base is None:
        raise NoHadamard(
            f"no Hadamard matrix of order {n} is known",
            hint=f"use a block-diagonal one, e.g. of block {largest_block(n)}" if n > 0 else None,
        )
    return base, (n // base).bit_length() - 1


@lru_cache
def _base_order(n: int) -> int | None:
    """The smallest m, 1 or a Paley order, for which n = m * 2^k."""
    if n < 1:
        return None
    order = n // (n & -n)
    while n % order == 0:
        if order == 1 or _paley_field(order) is not None:
            return order
        order *= 2
    return None


def _paley_field(order: int) -> int | None:
    """The field size q for which Paley's construction I or II gives this order."""
    if order % 4:
        return None
    first, second = order - 1, order // 2 - 1
    if _is_prime(first):
        return first
    # A prime squared is 1 modulo 4: it serves construction II only.
    square_root = math.isqrt(second)
    is_field = _is_prime(second) or (square_root**2 == second and _is_prime(square_root))
    return second if is_field and second % 4 == 1 else None


@lru_cache
def _base_matrix(order: int) -> Tensor:
    """The Paley matrix of this order, or [[1]]; on the CPU whatever the ambient device."""
    q = _paley_field(order)
    with torch.device("cpu"):
        return torch.ones(1, 1) if q is None else _paley(q)


def _paley(q: int) -> Tensor:
    """Paley's matrix of order q + 1 or 2 (q + 1) ('On orthogonal matrices', 1933).

    With the bordered matrix C of the quadratic character: I is C + identity (q = 3 mod 4, C
    skew), II is C with 0, 1, -1 replaced by 2 by 2 blocks (q = 1 mod 4, C symmetric).
    """
    bordered = torch.ones(q + 1, q + 1)
    bordered[0, 0] = 0
    bordered[1:, 1:] = _jacobsthal(q)
    if q % 4 == 3:
        bordered[1:, 0] = -1
        return bordered + torch.eye(q + 1)
    plus, diagonal = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]]])
    return torch.kron(bordered, plus) + torch.kron(torch.eye(q + 1), diagonal)


def _jacobsthal(q: int) -> Tensor:
    """The quadratic character of a - b for all a, b of the field of q = p or p^2 elements.

    In GF(p^2) = GF(p)(sqrt(g)), g a non-residue, an element is a square exactly where its norm
    a^2 - g b^2 is one in GF(p).
    """
    p = q if _is_prime(q) else math.isqrt(q)
    legendre = -torch.ones(p)
    legendre[torch.arange(p).square() % p] = 1
    legendre[0] = 0
    element = torch.arange(q)
    if q == p:
        return legendre[(element[:, None] - element) % p]
    high, low = element // p, element % p
    g = int((legendre == -1).nonzero()[0])
    norm = (high[:, None] - high).square() - g * (low[:, None] - low).square()
    return legendre[norm % p]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
