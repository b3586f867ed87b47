"""Norms that end in int8, against the operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmc import ops
from ssmc.kernels import hadamard
from ssmc.kernels import norm as kernels
from ssmc.quant.formats import scale_for


def agree(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Sums are in another order, so that a value at the middle between two integers may flip."""
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in expected]
    torch.testing.assert_close(got[1], expected[1], rtol=2**-7, atol=0)
    rows = (got[1] == expected[1]).squeeze(-1)
    apart = (got[0].int() - expected[0].int()).abs()[rows]
    assert rows.float().mean() > 0.8
    assert apart.max() <= 1
    assert (apart != 0).float().mean() < 0.01


@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 5, 63), (2, 3, 1000), (1, 2, 2560)])
@pytest.mark.parametrize("weighted", [False, True])
def test_norm(shape: tuple[int, ...], weighted: bool, device: torch.device) -> None:
    x, residual = torch.randn(2, *shape, device=device)
    weight = torch.rand(shape[-1], device=device) + 0.5 if weighted else None
    agree(kernels.rms_norm_quantize(x, weight, 1e-3), ops.rms_norm_quantize(x, weight, 1e-3))
    total, *got = kernels.add_rms_norm_quantize(x, residual, weight)
    expected_total, *expected = ops.add_rms_norm_quantize(x, residual, weight)
    assert torch.equal(total, expected_total)
    agree((got[0], got[1]), (expected[0], expected[1]))


def test_norm_of_views(device: torch.device) -> None:
    x, residual = torch.randn(2, 3, 4, 100, device=device)[..., 20:83]
    agree(kernels.rms_norm_quantize(x), ops.rms_norm_quantize(x))
    total, *got = kernels.add_rms_norm_quantize(x, residual)
    assert torch.equal(total, residual + x)
    agree((got[0], got[1]), ops.rms_norm_quantize(residual + x))


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    ("n", "group_size", "block"),
    [(64, None, 1), (63, 21, 1), (192, 48, 192), (192, 192, 64), (640, 320, 640), (1000, 200, 8)],
)
def test_gated(
    n: int,
    group_size: int | None,
    block: int,
    per_channel: bool,
    norm_before_gate: bool,
    device: torch.device,
) -> None:
    x = torch.randn(1, 3, n, device=device)
    gate_q = torch.randint(-127, 128, (1, 3, 2 * n), device=device, dtype=torch.int8)[..., n:]
    gate_scale = scale_for(torch.rand((n,) if per_channel else (), device=device) + 3)
    weight = torch.rand(n, device=device) + 0.5
    args = (x, gate_q, gate_scale, weight, 1e-5, group_size, norm_before_gate, block)
    # Narrow enough for several pieces, of which some groups begin in the middle.
    agree(kernels.gated_norm_quantize(*args, width=64), ops.gated_norm_quantize(*args))


@pytest.mark.parametrize("per_channel", [False, True])
def test_gated_rows_that_are_many(
    per_channel: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hadamard, "MANY_ROWS", 2)
    x = torch.randn(1, 3, 320, device=device)
    gate_q = torch.randint(-127, 128, x.shape, device=device, dtype=torch.int8)
    gate_scale = scale_for(torch.rand((320,) if per_channel else (), device=device) + 3)
    weight = torch.rand(320, device=device) + 0.5
    args = (x, gate_q, gate_scale, weight, 1e-5, None, False, 320)
    assert not hadamard.is_few(x)
    agree(kernels.gated_norm_quantize(*args), ops.gated_norm_quantize(*args))
