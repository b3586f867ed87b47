"""What holds for rotations of every size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes.rotation import rotation

from ssmc import ops
from ssmc.quant.rotation import NoHadamard, base_factor, hadamard_matrix, largest_block, rotate

from .orders import BASES, LIMIT, ORDERS, blocks, rotations

unhurried = settings(deadline=None, max_examples=60)  # the first call loads and compiles


@unhurried
@given(blocks())
def test_the_matrix_is_kron_of_the_smallest_paley_factor_and_sylvester(n: int) -> None:
    matrix, (m, base) = hadamard_matrix(n), base_factor(n)
    assert m == min(b for b in BASES if n % b == 0 and (n // b).bit_count() == 1)
    assert torch.equal(matrix, torch.kron(base, hadamard_matrix(n // m)))
    assert torch.all(matrix.abs() == 1)
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n))


@unhurried
@given(st.integers(1, LIMIT))
def test_the_greatest_usable_factor_is_chosen(n: int) -> None:
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    assert largest_block(n) == max(d for d in divisors if d in ORDERS)
    for d in divisors:
        if d > largest_block(n):
            with pytest.raises(NoHadamard):
                rotate(torch.ones(d), d)


@unhurried
@given(rotations(), st.integers(1, 5))
def test_fast_is_the_product_with_the_explicit_matrix(size: tuple[int, int], rows: int) -> None:
    width, block = size
    x, matrix = torch.randn(rows, width, dtype=torch.float64), rotation(width, block).double()
    fast = rotate(x, block)
    torch.testing.assert_close(fast, x @ matrix.T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fast.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    single = ops.hadamard(x.float().unsqueeze(0), block)[0]
    torch.testing.assert_close(single.double(), fast, rtol=1e-5, atol=1e-5)


@unhurried
@given(rotations())
def test_the_transpose_is_the_inverse(size: tuple[int, int]) -> None:
    width, block = size
    x = torch.randn(3, width, dtype=torch.float64)
    back = rotate(x, block) @ rotation(width, block).double()
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)
    weight = rotate(torch.eye(width, dtype=torch.float64), block)  # rows: H times a unit vector
    torch.testing.assert_close(rotate(x, block) @ weight.T, x, rtol=1e-12, atol=1e-12)
