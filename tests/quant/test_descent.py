"""Coordinate descent behind GPTQ, and weights that make up for what layers before have lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmc.errors import NumericsError
from ssmc.quant.descent import descend
from ssmc.quant.gptq import Hessian, corrected, gptq
from ssmc.quant.weights import WeightFormat

from .test_gptq import FORMS, ROWS, WIDTH, hessian_of, inputs

ERROR = 1 + 1e-4  # of sums in float32


def damped_error(difference: Tensor, hessian: Hessian, damping: float) -> float:
    matrix = hessian.matrix
    matrix = matrix + damping * matrix.diagonal().mean() * torch.eye(WIDTH)
    return ((difference.double() @ matrix) * difference).sum().item()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_each_sweep_errs_less(form: WeightFormat) -> None:
    weight, hessian = torch.randn(ROWS, WIDTH), hessian_of(inputs())
    q, scale = gptq(weight, hessian, form)
    errors = []
    for sweeps in range(4):
        got, s = descend(weight, q, scale, hessian, form, 0.01, sweeps)
        errors.append(damped_error(form.values(got, s) - weight, hessian, 0.01))
        assert torch.equal(s.bfloat16().float(), s)
        assert torch.equal(form.round(form.values(got, s), s), got)  # it lies on the grid
    assert errors[1] < 0.99 * errors[0], errors
    assert errors[3] <= ERROR * errors[2] <= ERROR**2 * errors[1], errors


def test_in_the_end_no_single_integer_can_be_bettered() -> None:
    weight, hessian, form = torch.randn(4, WIDTH), hessian_of(inputs()), WeightFormat(4)
    q, scale = gptq(weight, hessian, form)
    q, scale = descend(weight, q, scale, hessian, form, 0, sweeps=60)
    least = [row_error(weight, q, scale, hessian, form, row) for row in range(len(q))]
    for row in range(len(q)):
        for column in range(0, WIDTH, 5):
            for step in (-1, 1):
                other = q.clone()
                other[row, column] = (other[row, column] + step).clamp(-7, 7)
                error = row_error(weight, other, scale, hessian, form, row)
                assert error >= least[row] / ERROR


def row_error(
    weight: Tensor, q: Tensor, scale: Tensor, hessian: Hessian, form: WeightFormat, row: int
) -> float:
    return hessian.error((form.values(q, scale) - weight)[row : row + 1])


def test_scales_are_fitted_to_their_integers() -> None:
    form, hessian = WeightFormat(4, 16), hessian_of(inputs())
    scale = form.scales(torch.randn(ROWS, WIDTH))
    q = torch.randint(-7, 8, (ROWS, WIDTH), dtype=torch.int8)
    weight = form.values(q, scale)
    got, fitted = descend(weight, q, (scale * 1.25).bfloat16().float(), hessian, form, 0.01, 8)
    assert damped_error(form.values(got, fitted) - weight, hessian, 0.01) < 0.05 * damped_error(
        form.values(q, scale * 1.25) - weight, hessian, 0.01
    )
    assert torch.equal(descend(weight, q, scale, hessian, form)[1], scale)


def test_a_scale_of_a_whole_tensor_stays_one() -> None:
    weight, form = torch.randn(ROWS, WIDTH), WeightFormat(4, tensor=True)
    hessian = hessian_of(inputs())
    _, scale = descend(weight, *gptq(weight, hessian, form), hessian, form, 0.01, 3)
    assert torch.equal(scale, form.scales(weight))


def test_a_corrected_weight_is_the_regression_of_the_outputs_on_the_inputs() -> None:
    weight, x = torch.randn(ROWS, WIDTH), torch.randn(400, WIDTH).double()
    y = x @ torch.randn(WIDTH, ROWS).double()
    got = corrected(weight, hessian_of(x.float()), y.T @ x, damping=0)
    torch.testing.assert_close(got.double(), torch.linalg.lstsq(x, y).solution.T, rtol=1e-3,
                               atol=1e-3)  # fmt: skip


def test_outputs_of_the_weight_itself_correct_nothing() -> None:
    weight, x = torch.randn(ROWS, WIDTH), inputs()
    hessian = hessian_of(x)
    outputs = weight.double() @ hessian.matrix
    torch.testing.assert_close(corrected(weight, hessian, outputs), weight)


def test_damping_keeps_a_corrected_weight_near() -> None:
    weight, x = torch.randn(ROWS, WIDTH), torch.randn(400, WIDTH)
    outputs = torch.randn(ROWS, WIDTH).double() @ hessian_of(x).matrix
    moved = [(corrected(weight, hessian_of(x), outputs, d) - weight).norm() for d in (0.01, 1, 100)]
    assert moved[0] > 1.8 * moved[1] > 20 * moved[2]


def test_too_few_inputs_to_correct_by() -> None:
    with pytest.raises(NumericsError, match="not positive definite"):
        corrected(torch.randn(3, WIDTH), hessian_of(inputs(5)), torch.zeros(3, WIDTH).double(), 0)
