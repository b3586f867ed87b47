"""Rotations in a kernel: the operator's values up to the order of the sums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes.rotation import rotation
from quant.orders import rotations

from ssmc import ops
from ssmc.kernels import hadamard as kernels
from ssmc.quant.formats import dequantize_tensor
from ssmc.quant.rotation import base_factor, hadamard_matrix

# Powers of two and Paley orders, whole rows and blocks, in few pieces and in many, in bundles that
# are full and not, turned once and often.
CASES = [(64, 64), (64, 8), (192, 64), (192, 192), (96, 12), (320, 320), (5120, 5120), (1000, 8)]
CASES += [(1536, 1536), (112, 112), (144, 72), (2048, 1024), (63, 1)]
CASES += [(896, 896), (1024, 16), (4, 4), (2, 2)]


@pytest.mark.parametrize(("n", "block"), CASES)
def test_rotation(n: int, block: int, device: torch.device) -> None:
    x = torch.randn(1, 3, n + 8, device=device)[..., 4:-4]
    expected = ops.hadamard(x, block)
    assert kernels.plan(n, block, 256) is not None
    torch.testing.assert_close(kernels.hadamard(x, block), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernels.hadamard(x, block, width=32), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "block"), [(320, 320), (192, 64), (84, 84)])
def test_quantized(n: int, block: int, device: torch.device) -> None:
    x = torch.randn(2, 5, n, device=device)
    q, scale = kernels.hadamard_quantize(x, block)
    expected_q, expected_scale = ops.hadamard_quantize(x, block)
    torch.testing.assert_close(scale, expected_scale, rtol=2**-7, atol=0)
    rows = (scale == expected_scale).squeeze(-1)
    apart = (q.int() - expected_q.int()).abs()[rows]
    assert rows.float().mean() > 0.8
    assert apart.max() <= 1
    assert (apart != 0).float().mean() < 0.01
    error = (dequantize_tensor(q, scale) - ops.hadamard(x, block)).abs()
    assert (error <= 0.501 * scale).all()


def test_an_order_too_large_is_left_to_the_operator(device: torch.device) -> None:
    assert kernels.plan(84, 84, 256) is None
    x = torch.randn(1, 2, 84, device=device)
    assert torch.equal(kernels.hadamard(x, 84), ops.hadamard(x, 84))


@settings(deadline=None)
@given(rotations(2048), st.sampled_from([8, 64, 256]))
def test_a_plan_is_the_matrix_in_pieces(size: tuple[int, int], width: int) -> None:
    n, block = size
    found = kernels.plan(n, block, width)
    if found is None:
        order, _ = base_factor(block)
        assert order > kernels.MAX_ORDER or n > kernels.MAX_PIECES * min(width, block // order)
        return
    order, pieces = len(found.signs), -(-n // found.width)
    bits = torch.tensor([[row >> j & 1 for j in range(order)] for row in found.signs])
    matrix = torch.kron(1.0 - 2 * bits, hadamard_matrix(2**found.doublings))
    assert torch.equal(matrix, hadamard_matrix(block))
    assert found.factor == pytest.approx(block**-0.5)
    assert found.width <= width
    assert order == 1 or block % found.width == 0
    room = sum(1 << log for log in found.bundles)
    assert pieces <= room
    assert found.inner == 0 or 4 * (room - pieces) <= room
    for log in found.bundles:
        turns = range(kernels.turns_of(log, found.inner))
        assert sum(kernels.bits_of(turn, log, found.inner) for turn in turns) == found.inner


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's code is compiled for each size")
@settings(deadline=None, max_examples=12)
@given(rotations(160))
def test_a_row_is_multiplied_by_the_explicit_matrix(size: tuple[int, int]) -> None:
    n, block = size
    x = torch.randn(1, 2, n)
    expected = x @ rotation(n, block).T
    torch.testing.assert_close(kernels.hadamard(x, block, width=32), expected, rtol=1e-5, atol=1e-5)
