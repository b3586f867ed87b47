"""Formats of weights: what shares a scale, what integers stand for, how they are stored."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssmc.quant.formats import bf16_up, columns_packed, qmax, quantize_weight, scale_for
from ssmc.quant.weights import WeightFormat, dequantize_packed, quantize_groups, tanh_levels

BITS = st.integers(2, 8)
RANGES = st.sampled_from(["absmax", "mse", "tanh"])


@st.composite
def formats(draw: st.DrawFn) -> tuple[WeightFormat, int]:
    """A format, and a width that fits it."""
    bits = draw(BITS)
    group = draw(st.none() | st.integers(1, 4).map(lambda n: n * columns_packed(bits)))
    form = WeightFormat(bits, group, draw(st.booleans()), draw(RANGES))
    return form, draw(st.integers(1, 4)) * (group or columns_packed(bits))


def rounded(form: WeightFormat, weight: Tensor) -> Tensor:
    scale = form.scales(weight)
    return form.values(form.round(weight, scale), scale)


def error(form: WeightFormat, weight: Tensor) -> float:
    return ((rounded(form, weight) - weight).norm() / weight.norm()).item()


@given(formats())
def test_what_is_stored_is_what_was_rounded(given_format: tuple[WeightFormat, int]) -> None:
    form, width = given_format
    assert form.fits(width)
    weight = torch.randn(3, width)
    scale = form.scales(weight)
    q = form.round(weight, scale)
    assert scale.shape == (3, width // (form.group or width))
    assert torch.equal(scale.bfloat16().float(), scale)
    integers, stored = form.store(q, scale)
    if form.packed:
        assert integers.nbytes * 8 == q.numel() * form.bits
        values = dequantize_packed(integers, stored, form.bits, form.range == "tanh")
    else:
        assert (integers.dtype, stored.dim()) == (torch.int8, 0 if form.tensor else 2)
        values = integers.float() * stored
    assert torch.equal(values, form.values(q, scale))


@given(formats())
def test_quantising_again_changes_nothing(given_format: tuple[WeightFormat, int]) -> None:
    form, width = given_format
    scale = form.scales(torch.randn(2, width))
    q = torch.randint(form.lowest, qmax(form.bits) + 1, (2, width), dtype=torch.int8)
    assert torch.equal(form.round(form.values(q, scale), scale), q)


def test_scales_cover_what_shares_them() -> None:
    weight = torch.randn(5, 32) * torch.logspace(-3, 3, 5)[:, None]
    magnitude = weight.abs()
    group = WeightFormat(4, 8).scales(weight)
    assert torch.equal(group, scale_for(magnitude.unflatten(1, (4, 8)).amax(2), 4))
    assert torch.equal(WeightFormat(4).scales(weight), scale_for(magnitude.amax(1, True), 4))
    whole = WeightFormat(4, tensor=True).scales(weight)
    assert torch.equal(whole, scale_for(magnitude.max(), 4).expand(5, 1))


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_eight_bits_of_rows_are_plain_int8(granularity: str) -> None:
    weight, form = torch.randn(5, 7), WeightFormat(tensor=granularity == "tensor")
    scale = form.scales(weight)
    stored = form.store(form.round(weight, scale), scale)
    expected = quantize_weight(weight, granularity)  # type: ignore[arg-type]
    assert all(torch.equal(*pair) for pair in zip(stored, expected, strict=True))


def test_widths_that_do_not_divide() -> None:
    assert not WeightFormat(4, 32).fits(80)
    assert WeightFormat(4, 16).fits(80)
    assert not WeightFormat(3).fits(84)
    assert WeightFormat(6).fits(84)
    assert WeightFormat(8).fits(83)


def test_each_bit_more_is_nearer() -> None:
    weight = torch.randn(64, 256)
    errors = [error(WeightFormat(bits, 64), weight) for bits in range(2, 9)]
    assert all(more < 0.7 * fewer for fewer, more in pairwise(errors)), errors


def test_smaller_groups_are_nearer() -> None:
    weight = torch.randn(64, 256) * torch.exp(torch.randn(64, 256) / 2)
    forms = (WeightFormat(4, tensor=True), *(WeightFormat(4, g) for g in (None, 128, 32)))
    errors = [error(form, weight) for form in forms]
    assert all(finer < 0.95 * coarser for coarser, finer in pairwise(errors)), errors


def test_an_outlier_costs_its_own_group_only() -> None:
    weight = torch.randn(3, 32)
    weight[:, 8:16] *= 100
    packed, scale = quantize_groups(weight, 8)
    off = (dequantize_packed(packed, scale) - weight).abs().unflatten(1, (4, 8))
    assert (off <= 0.51 * scale.unsqueeze(2)).all()


@given(formats())
def test_the_range_of_least_error_is_no_worse(given_format: tuple[WeightFormat, int]) -> None:
    form, width = given_format
    weight = torch.randn(3, width) ** 3
    widest, best = (error(replace(form, range=r), weight) for r in ("absmax", "mse"))
    assert best <= widest * (1 + 1e-6)


def test_the_range_of_least_error_is_the_optimal_one_of_a_normal_distribution() -> None:
    weight = torch.randn(1, 1 << 16)
    scale = WeightFormat(2, range="mse").scales(weight).abs().item()
    steps = torch.linspace(0.5, 2, 151)  # of levels -2, -1, 0 and 1
    errors = [((weight / s).round().clamp(-2, 1) * s - weight).norm().item() for s in steps]
    assert scale == pytest.approx(steps[errors.index(min(errors))].item(), rel=0.06)
    low_bits = [error(WeightFormat(2, range=r), weight) for r in ("absmax", "mse")]
    assert low_bits[1] < 0.6 * low_bits[0]


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("side", [-1, 1])
def test_the_lowest_integer_is_used_on_the_side_that_reaches_further(bits: int, side: int) -> None:
    weight = torch.arange(1.0, 2 ** (bits - 1) + 1).repeat(2, 1)
    weight[1] *= -1
    weight[:, :-1] *= torch.tensor([-1.0, 1.0]).repeat(1, 64)[:, : weight.shape[1] - 1]
    weight *= side
    form = WeightFormat(bits, range="mse")
    scale = form.scales(weight)
    assert scale.flatten().tolist() == [-side, side]
    assert (form.round(weight, scale)[:, -1] == -(2 ** (bits - 1))).all()
    assert torch.equal(rounded(form, weight), weight)


def test_one_level_more_errs_less() -> None:
    weight = torch.randn(64, 256)
    for bits, share in ((2, 0.85), (3, 0.9), (4, 0.93)):
        symmetric = replace(WeightFormat(bits, 32, range="mse"))
        scale = best_symmetric(symmetric, weight)
        q = (weight.unflatten(1, (-1, 32)) / scale).round().clamp(-qmax(bits), qmax(bits))
        left = (q * scale).flatten(1) - weight
        assert error(symmetric, weight) < share * (left.norm() / weight.norm()).item()


def best_symmetric(form: WeightFormat, weight: Tensor) -> Tensor:
    """The scales [N, G, 1] of least error of symmetric integers, by a fine search."""
    runs, limit = weight.unflatten(1, (-1, form.group or 1)), qmax(form.bits)
    scales = [runs.abs().amax(2, True) / limit * f for f in torch.linspace(0.3, 1, 71)]
    errors = [((runs / s).round().clamp(-limit, limit) * s - runs).norm(dim=2) for s in scales]
    best = torch.stack(errors).argmin(0)[None, ..., None]
    return torch.stack(scales).gather(0, best)[0]


# -- levels spaced by a hyperbolic tangent --------------------------------------------------------


@given(BITS)
def test_tanh_levels_are_symmetric_and_end_at_the_range(bits: int) -> None:
    levels = tanh_levels(bits)
    assert len(levels) == 2 * qmax(bits) + 1
    assert torch.equal(levels, -levels.flip(0))
    assert levels[-1].item() == pytest.approx(1, abs=1e-6)
    gaps = levels.diff()[qmax(bits) :]
    assert (gaps.diff() > 0).all()


@given(BITS)
def test_tanh_levels_are_steps_of_the_tangent(bits: int) -> None:
    tangents = torch.tanh(3 * tanh_levels(bits).double())
    steps = tangents.diff()
    torch.testing.assert_close(steps, torch.full_like(steps, math.tanh(3) / qmax(bits)))


@pytest.mark.parametrize("tensor", [False, True])
def test_tanh_clips_at_three_sigma(tensor: bool) -> None:
    weight = torch.randn(4, 1000)
    weight[:, 0] = 50
    form = WeightFormat(8, tensor=tensor, range="tanh")
    sigma = weight.square().mean(None if tensor else 1, keepdim=True).sqrt()
    expected = bf16_up(3 * sigma).expand(4, 1)
    scale = form.scales(weight)
    assert torch.equal(scale, expected)
    assert torch.allclose(rounded(form, weight).amax(1, True), expected)


def test_tanh_clips_nothing_where_nothing_reaches_three_sigma() -> None:
    weight = torch.tensor([[1.0, -1.0, 0.5, 0.25]])
    assert WeightFormat(8, range="tanh").scales(weight).item() == 1


def test_tanh_serves_small_weights_better_and_large_ones_worse() -> None:
    weight = torch.randn(64, 256)
    off = [(rounded(WeightFormat(4, range=r), weight) - weight).abs() for r in ("absmax", "tanh")]
    small, large = weight.abs() < 0.5, (weight.abs() > 1.5) & (weight.abs() < 2.5)
    assert off[1][small].mean() < 0.7 * off[0][small].mean()
    assert off[1][large].mean() > 1.2 * off[0][large].mean()


def test_a_weight_of_zeros_stays_one() -> None:
    for form in (WeightFormat(4, 8, range=r) for r in ("absmax", "mse", "tanh")):
        assert not rounded(form, torch.zeros(2, 16)).any()
