"""States as integers: every value is reached, scales are as fine as promised, noise is fair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssmc.errors import UsageError
from ssmc.quant.formats import qmax
from ssmc.quant.state import (
    dequantize_state_tensor,
    quantize_state_tensor,
    spread_scale,
    uniform_noise,
)

SCALES = ["tensor", "group", "decoupled", "decoupled-max"]
SHAPES = [(3, 7, 12), (2, 3, 5, 8)]


def rounded(h: Tensor, bits: int, scales: str, group: int = 4) -> Tensor:
    return dequantize_state_tensor(*quantize_state_tensor(h, bits, scales, group), scales)


def outer(shape: tuple[int, ...]) -> Tensor:
    """A state whose channels and whose places in the state dimension differ in size by far."""
    *_, P, N = shape
    return torch.randn(shape) * torch.logspace(-2, 2, P)[:, None] * torch.logspace(-2, 2, N)


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_value_is_within_half_a_step(shape: tuple[int, ...], scales: str, bits: int) -> None:
    h = outer(shape)
    q, scale = quantize_state_tensor(h, bits, scales, 4)
    assert (q.dtype, scale.dtype) == (torch.uint8 if bits == 4 else torch.int8, torch.bfloat16)
    step = spread_scale(scale, scales, h.shape[-1])
    back = dequantize_state_tensor(q, scale, scales)
    assert ((back - h).abs() <= step.abs() * (0.5 + 1e-5)).all()
    integers = (back / step).round()
    if scales in ("tensor", "group"):
        assert integers.min() == -qmax(bits) - 1
    else:
        assert integers.abs().max() == qmax(bits)


@pytest.mark.parametrize("scales", ["tensor", "group"])
@pytest.mark.parametrize(("above", "below"), [(8.0, -6.0), (6.0, -8.0), (7.5, -7.0), (7.0, -7.5)])
def test_the_side_that_reaches_further_has_one_integer_more(
    above: float, below: float, scales: str
) -> None:
    h = torch.tensor([above, below, 0.25, 1.0]).view(1, 1, 4)
    _, scale = quantize_state_tensor(h, 4, scales, 4)
    assert scale.item() == (-1 if above > -below else 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_four_bits_take_half_the_bytes_and_an_odd_width_a_byte_each(shape: tuple[int, ...]) -> None:
    h = torch.randn(shape)
    sizes = {bits: quantize_state_tensor(h, bits, "tensor", 4)[0].nbytes for bits in (8, 4)}
    assert sizes == {8: h.numel(), 4: h.numel() // 2}
    odd = h[..., 1:]
    q, scale = quantize_state_tensor(odd, 4, "tensor", 4)
    assert q.nbytes == odd.numel()
    off = (dequantize_state_tensor(q, scale, "tensor") - odd).abs().max()
    assert off <= 0.51 * scale.abs().max()


def test_finer_scales_err_less_where_channels_and_places_differ() -> None:
    h = outer((4, 16, 16))[..., torch.randperm(16)]
    errors = {s: (rounded(h, 4, s, group=16) - h).norm().item() for s in SCALES}
    assert errors["decoupled"] < 0.5 * errors["tensor"], errors
    assert errors["decoupled"] < 0.9 * errors["group"], errors


def test_the_largest_of_a_channel_as_its_scale_suits_small_channels() -> None:
    h = outer((4, 16, 16))
    small = {s: (rounded(h, 4, s) / h - 1)[:, :4].abs().mean().item() for s in SCALES[2:]}
    assert small["decoupled-max"] < 0.7 * small["decoupled"], small


@pytest.mark.parametrize("scales", SCALES)
def test_sequences_have_scales_of_their_own(scales: str) -> None:
    h = torch.randn(2, 5, 8)
    for size in (1e-20, 1e20):
        h[1] *= size
        assert torch.equal(rounded(h, 8, scales)[:1], rounded(h[:1], 8, scales))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scales", SCALES)
def test_zeros_stay_and_a_fresh_state_is_zeros(scales: str, bits: int) -> None:
    h = torch.randn(2, 5, 8)
    h[1] = 0
    assert (rounded(h, bits, scales)[1] == 0).all()
    q, scale = quantize_state_tensor(h, bits, scales, 4)
    fresh = dequantize_state_tensor(torch.zeros_like(q), torch.zeros_like(scale), scales)
    assert (fresh == 0).all()


def test_unknown_scales() -> None:
    with pytest.raises(UsageError, match="unknown scales 'row'"):
        quantize_state_tensor(torch.randn(1, 2, 2), 8, "row", 2)


# -- stochastic rounding ----------------------------------------------------------------------


def stochastic(h: Tensor, step: int, seed: int = 0) -> Tensor:
    count = torch.full((len(h), 1), step, dtype=torch.int32)
    noise = uniform_noise(count, h.shape, seed)
    return dequantize_state_tensor(*quantize_state_tensor(h, 4, "tensor", 4, noise), "tensor")


@settings(max_examples=40, deadline=None)
@given(st.floats(-0.999, 0.999), st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_stochastic_rounding_is_unbiased_in_the_mean(x: float, step: int, seed: int) -> None:
    h = torch.full((1, 64, 64), x)
    h[0, 0, 0] = 1.0  # the scale stays the same, whatever x is
    back = stochastic(h, step, seed)[0, 1:]
    grid = 1 / 7 * (1 + 2**-7)  # scales are rounded up
    # Five standard deviations of the mean of 4,032 values, each off by less than a step.
    assert abs(back.mean().item() - x) < 5 * 0.5 * grid / 63
    assert ((back - x).abs() <= grid).all()


def test_a_small_change_repeated_is_lost_to_rounding_but_for_noise() -> None:
    nearest = noisy = torch.zeros(1, 16, 16).index_fill(1, torch.tensor([0]), 1.0)
    for step in range(200):
        change = torch.full_like(noisy, 2e-3).index_fill(1, torch.tensor([0]), 0.0)
        nearest = rounded(nearest + change, 4, "tensor")
        noisy = stochastic(noisy + change, step)
    assert (nearest[0, 1:] == 0).all()
    assert abs(noisy[0, 1:].mean().item() - 0.4) < 0.1


def test_noise_is_uniform_and_differs_by_step_seed_and_place() -> None:
    steps = torch.tensor([[0], [1], [5]], dtype=torch.int32)
    noise = uniform_noise(steps, torch.Size((3, 40, 50)), 0)
    assert noise.min() >= 0
    assert noise.max() < 1
    shares = torch.histc(noise, 10, 0, 1) / noise.numel()
    assert (shares - 0.1).abs().max() < 0.02
    other = uniform_noise(steps, torch.Size((3, 40, 50)), 1)
    rows = torch.cat([noise.flatten(1), other.flatten(1), noise.mT.flatten(1)])
    correlation = torch.corrcoef(rows) - torch.eye(9)
    assert correlation.abs().max() < 0.08


def test_noise_is_the_same_in_any_batch() -> None:
    steps = torch.tensor([[3], [9]], dtype=torch.int32)
    both = uniform_noise(steps, torch.Size((2, 4, 6)), 7)
    assert torch.equal(both[1:], uniform_noise(steps[1:], torch.Size((1, 4, 6)), 7))
