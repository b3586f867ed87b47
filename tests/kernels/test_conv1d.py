"""The int8 convolution: sums and scaling to the bit, the activation up to its exponential."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ssmc import ops
from ssmc.kernels import conv1d as kernels
from ssmc.quant.formats import scale_for


def int8(*shape: int, device: torch.device) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)


def operands(
    batch: int, length: int, channels: int, taps: int, plain: bool, device: torch.device
) -> tuple[Any, ...]:
    """x (a view of some channels of a wider tensor), its scale, weight, its scale, bias, state."""
    shape = () if plain else (channels,)
    return (
        int8(batch, length, channels + 9, device=device)[..., 5:-4],
        scale_for(torch.rand(shape, device=device) + 1),
        int8(channels, taps, device=device),
        scale_for(torch.rand(() if plain else (channels, 1), device=device) + 1),
        None if plain else torch.randn(channels, device=device),
        None if plain else int8(batch, taps - 1, channels, device=device),
    )


SHAPES = [(2, 9, 63, 4), (1, 1, 64, 4), (2, 2, 33, 4), (1, 20, 300, 3), (1, 5, 16, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("plain", [False, True])
def test_float(shape: tuple[int, int, int, int], plain: bool, device: torch.device) -> None:
    args = operands(*shape, plain, device)
    before = None if plain else args[5].clone()
    y, state = kernels.int8_causal_conv1d(*args, "none", positions=4, block_c=32)
    expected, expected_state = ops.int8_causal_conv1d(*args, "none")
    assert torch.equal(y, expected)
    assert torch.equal(state, expected_state)
    y, state = kernels.int8_causal_conv1d(*args, "silu")
    torch.testing.assert_close(y, ops.int8_causal_conv1d(*args, "silu")[0], rtol=2e-6, atol=1e-6)
    assert torch.equal(state, expected_state)
    assert plain or torch.equal(args[5], before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("plain", [False, True])
def test_quantized(shape: tuple[int, int, int, int], plain: bool, device: torch.device) -> None:
    args = operands(*shape, plain, device)
    # Ranges smaller than the values': some saturate.
    out_scale = scale_for(torch.rand(shape[2], device=device) + 2)
    q, state = kernels.int8_causal_conv1d_quantize(*args, "none", out_scale)
    expected, expected_state = ops.int8_causal_conv1d_quantize(*args, "none", out_scale)
    assert torch.equal(q, expected)
    assert torch.equal(state, expected_state)
    q, _ = kernels.int8_causal_conv1d_quantize(*args, "silu", out_scale)
    expected, _ = ops.int8_causal_conv1d_quantize(*args, "silu", out_scale)
    assert (q.int() - expected.int()).abs().max() <= 1
    assert (q != expected).float().mean() < 1e-3


@pytest.mark.parametrize(("heads", "groups", "size"), [((8, 8), 1, 16), ((3, 7), 3, 5)])
@pytest.mark.parametrize("length", [1, 2, 11])
@pytest.mark.parametrize("plain", [False, True])
def test_split(
    heads: tuple[int, int],
    groups: int,
    size: int,
    length: int,
    plain: bool,
    device: torch.device,
) -> None:
    width = heads[0] * heads[1]
    args = operands(2, length, width + 2 * groups * size, 4, plain, device)
    out_scale = scale_for(torch.rand(heads, device=device) + 2)
    got = kernels.int8_causal_conv1d_split(*args, "none", out_scale, groups, positions=4)
    expected = ops.int8_causal_conv1d_split(*args, "none", out_scale, groups)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    got = kernels.int8_causal_conv1d_split(*args, "silu", out_scale, groups, block_c=32)
    expected = ops.int8_causal_conv1d_split(*args, "silu", out_scale, groups)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2**-7, atol=1)


def test_many_taps_are_left_to_the_operator(device: torch.device) -> None:
    args = operands(1, 3, 8, 20, False, device)
    for a, b in zip(kernels.int8_causal_conv1d(*args), ops.int8_causal_conv1d(*args), strict=True):
        assert torch.equal(a, b)


def test_short_prompts_have_shorter_programs() -> None:
    assert [kernels._positions(20, length, 132) for length in (512, 1024, 2048)] == [4, 8, 16]
    assert kernels._positions(1, 1, 132) == 4
