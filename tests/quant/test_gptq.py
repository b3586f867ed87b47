"""GPTQ against a direct computation, and for what it is good for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmc.errors import NumericsError
from ssmc.quant.gptq import Hessian, gptq
from ssmc.quant.weights import WeightFormat

ROWS, WIDTH = 12, 48
FORMS = [
    WeightFormat(8),
    WeightFormat(4),
    WeightFormat(3, 16),
    WeightFormat(4, tensor=True),
    WeightFormat(4, 16, range="tanh"),
]


def inputs(tokens: int = 400) -> Tensor:
    """Inputs that are correlated, of channels of different size."""
    mix = torch.randn(WIDTH, WIDTH) / 4 + torch.eye(WIDTH)
    return torch.randn(tokens, WIDTH) * torch.logspace(-1, 1, WIDTH) @ mix


def hessian_of(x: Tensor) -> Hessian:
    hessian = Hessian(x.shape[-1])
    hessian.add(x)
    return hessian


def values(form: WeightFormat, weight: Tensor) -> Tensor:
    scale = form.scales(weight)
    return form.values(form.round(weight, scale), scale)


def one_by_one(weight: Tensor, matrix: Tensor, scale: Tensor, form: WeightFormat) -> Tensor:
    """Optimal brain quantisation in the order of the columns: arXiv 2210.17323, equations 2, 3."""
    w, q = weight.double().clone(), torch.zeros_like(weight)
    inverse = matrix.inverse()
    for j in range(weight.shape[1]):
        s = scale[:, j // (weight.shape[1] // scale.shape[1])][:, None]
        integers = form.round(w[:, j : j + 1].float(), s)
        q[:, j : j + 1] = integers
        error = w[:, j : j + 1] - form.values(integers, s)
        w -= error * inverse[j] / inverse[j, j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return q.to(torch.int8)


@pytest.mark.parametrize("act_order", [False, True])
def test_columns_are_rounded_as_one_by_one(act_order: bool) -> None:
    weight, form = torch.randn(ROWS, WIDTH), WeightFormat(4)
    hessian, scale = hessian_of(inputs()), form.scales(weight)
    matrix = hessian.matrix
    damped = matrix + 0.01 * matrix.diagonal().mean() * torch.eye(WIDTH)
    order = torch.arange(WIDTH)
    if act_order:
        order = matrix.diagonal().argsort(descending=True)
    expected = torch.empty_like(weight, dtype=torch.int8)
    expected[:, order] = one_by_one(weight[:, order], damped[order][:, order], scale, form)
    q, got = gptq(weight, hessian, form, act_order=act_order)
    assert torch.equal(got, scale)
    assert (q != expected).float().mean() < 0.01  # ties of float32 against float64
    assert (q != form.round(weight, scale)).float().mean() > 0.1


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = torch.randn(ROWS, WIDTH), hessian_of(inputs())
    whole, _ = gptq(weight, hessian, WeightFormat(4))
    for block in (1, 7, 16):
        monkeypatch.setattr("ssmc.quant.gptq.BLOCK", block)
        q, _ = gptq(weight, hessian, WeightFormat(4))
        assert (q != whole).float().mean() < 0.01


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("act_order", [False, True])
def test_outputs_err_less_than_with_nearest_integers(form: WeightFormat, act_order: bool) -> None:
    weight, x = torch.randn(ROWS, WIDTH), inputs()
    q, scale = gptq(weight, hessian_of(x), form, act_order=act_order)
    got, nearest = form.values(q, scale), values(form, weight)
    left = [(x @ (w - weight).T).square().sum() for w in (got, nearest)]
    assert left[0] < 0.6 * left[1]
    assert torch.equal(form.round(got, scale), q)  # it lies on the grid


def test_act_order_takes_another_order() -> None:
    weight, hessian = torch.randn(ROWS, WIDTH), hessian_of(inputs())
    plain, ordered = (gptq(weight, hessian, WeightFormat(4), act_order=a)[0] for a in (False, True))
    assert (plain != ordered).float().mean() > 0.02


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("form", [WeightFormat(4, 16), WeightFormat(8, tensor=True)], ids=str)
def test_independent_inputs_leave_the_nearest_integers(form: WeightFormat, act_order: bool) -> None:
    weight, hessian = torch.randn(ROWS, WIDTH), Hessian(WIDTH)
    hessian.matrix = torch.diag(torch.rand(WIDTH).double() + 0.1)
    q, scale = gptq(weight, hessian, form, act_order=act_order)
    assert torch.equal(scale, form.scales(weight))
    assert torch.equal(q, form.round(weight, scale))


def test_scales_of_later_groups_follow_what_was_made_up() -> None:
    weight, form, hessian = torch.randn(ROWS, WIDTH), WeightFormat(2, 16), hessian_of(inputs())
    _, scale = gptq(weight, hessian, form)
    before = form.scales(weight)
    assert torch.equal(scale[:, 0], before[:, 0])
    assert (scale[:, 1:] != before[:, 1:]).any()
    _, ordered = gptq(weight, hessian, form, act_order=True)
    assert torch.equal(ordered, before)


def test_the_hessian_is_a_sum_over_batches() -> None:
    x = inputs().view(4, 100, WIDTH)
    parts = Hessian(WIDTH)
    for part in x:
        parts.add(part)
    expected = x.flatten(0, 1).double()
    torch.testing.assert_close(parts.matrix, expected.T @ expected, rtol=1e-5, atol=1e-3)
    change = torch.randn(ROWS, WIDTH)
    error = (expected @ change.double().T).square().sum().item()
    assert parts.error(change) == pytest.approx(error, rel=1e-5)


def test_damping_makes_up_for_too_few_tokens() -> None:
    weight, hessian = torch.randn(ROWS, WIDTH), hessian_of(inputs(tokens=20))
    with pytest.raises(NumericsError, match="Hessian of 48 inputs is not positive") as caught:
        gptq(weight, hessian, WeightFormat(4), damping=0)
    assert "damping" in (caught.value.hint or "")
    q, scale = gptq(weight, hessian, WeightFormat(4))
    assert hessian.error(WeightFormat(4).values(q, scale) - weight) < hessian.error(
        values(WeightFormat(4), weight) - weight
    )


def test_inputs_that_are_all_zero_are_an_error() -> None:
    with pytest.raises(NumericsError, match="not positive definite"):
        gptq(torch.randn(3, 8), hessian_of(torch.zeros(5, 8)), WeightFormat(4))
