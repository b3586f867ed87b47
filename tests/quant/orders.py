"""Orders of Hadamard matrices and widths made of them, for tests that draw them."""

from __future__ import annotations

from hypothesis import strategies as st

LIMIT = 2048


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


_FIELDS = {q for p in range(3, LIMIT) if _is_prime(p) for q in (p, p * p) if q < LIMIT}
BASES = {1} | {q + 1 if q % 4 == 3 else 2 * (q + 1) for q in _FIELDS}
"""What Paley's constructions give, over fields of a prime or its square, and 1."""
ORDERS = sorted({m << k for m in BASES for k in range(12) if m << k <= LIMIT})

_MODELS = [1, 12, 20, 28, 36, 40, 44, 60, 140]  # the factors of the widths of models


@st.composite
def blocks(draw: st.DrawFn, limit: int = 768) -> int:
    """m * 2^k, at most `limit`: m of a model's width, or any order."""
    m = draw(st.sampled_from(_MODELS) | st.sampled_from(ORDERS).filter(lambda n: n <= limit))
    return m << draw(st.integers(0, (limit // m).bit_length() - 1))


@st.composite
def rotations(draw: st.DrawFn, limit: int = 768) -> tuple[int, int]:
    """A width, at most `limit` and often odd, and the block it is rotated in.

    The block is any that divides the width, or the largest of those.
    """
    block = draw(blocks(limit))
    width = block * draw(st.integers(1, limit // block))
    whole = max(n for n in ORDERS if width % n == 0)
    return width, draw(st.sampled_from([block, whole]))
