"""Quantisation kernels give the operators' bits."""

from __future__ import annotations

import pytest
import torch

from ssmc import ops
from ssmc.kernels import quantize as kernels
from ssmc.quant.formats import scale_for


@pytest.mark.parametrize("shape", [(2, 9, 63), (1, 1, 1000), (3, 5, 16)])
@pytest.mark.parametrize("per_channel", [False, True])
def test_static(shape: tuple[int, ...], per_channel: bool, device: torch.device) -> None:
    x = torch.randn(shape, device=device) * 3
    # Ranges smaller than the values': some saturate.
    limit = torch.rand(shape[-1:] if per_channel else (), device=device) + 1
    scale = scale_for(limit)
    assert torch.equal(kernels.quantize(x, scale), ops.quantize(x, scale))


def test_static_of_heads(device: torch.device) -> None:
    x = torch.randn(2, 3, 5, 8, device=device)
    scale = scale_for(torch.rand(5, 8, device=device) + 1)
    assert torch.equal(kernels.quantize(x, scale), ops.quantize(x, scale))


def test_static_of_a_view(device: torch.device) -> None:
    x = torch.randn(2, 7, 100, device=device)[..., 30:93]
    scale = scale_for(torch.rand(63, device=device) + 1)
    assert torch.equal(kernels.quantize(x, scale), ops.quantize(x, scale))


@pytest.mark.parametrize("bits", [4, 8])
def test_static_of_another_shape_or_width(bits: int, device: torch.device) -> None:
    x, limit = torch.randn(2, 3, 16, device=device), torch.rand(2, 3, 1, device=device) + 1
    scale = scale_for(limit, bits)
    assert torch.equal(kernels.quantize(x, scale, bits), ops.quantize(x, scale, bits))


@pytest.mark.parametrize("width", [1, 16, 63, 160, 1000, 2560])
@pytest.mark.parametrize("bits", [4, 8])
def test_dynamic(width: int, bits: int, device: torch.device) -> None:
    x = torch.randn(2, 5, width + 3, device=device)[..., 2:-1] * torch.rand(2, 5, 1, device=device)
    x[0, 3] = 0
    for got, expected in zip(
        kernels.quantize_dynamic(x, bits), ops.quantize_dynamic(x, bits), strict=True
    ):
        assert torch.equal(got, expected)
