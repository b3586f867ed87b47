"""Experts against their definition, a token and an expert at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmc.errors import UsageError
from ssmc.ops import (
    dequantize,
    dequantize_groups,
    expert_linear,
    int8_expert_linear,
    quantize_dynamic,
    top_k,
)
from ssmc.ops.experts import by_expert
from ssmc.quant.formats import quantize_weight
from ssmc.quant.weights import quantize_groups

from .closeness import relative_error


def one_by_one(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    each = x.unsqueeze(2).expand(*index.shape, x.shape[-1]) if x.dim() == 3 else x
    y = torch.empty(*index.shape, weight.shape[1])
    for b, t, k in torch.cartesian_prod(*(torch.arange(n) for n in index.shape)).tolist():
        y[b, t, k] = weight[index[b, t, k]] @ each[b, t, k]
    return y


@pytest.mark.parametrize("shape", [(2, 63, 11), (2, 63, 3, 11), (1, 1, 11)])
@pytest.mark.parametrize("exact", [False, True])
def test_products_are_those_of_the_chosen(shape: tuple[int, ...], exact: bool) -> None:
    x, weight = torch.randn(shape), torch.randn(5, 9, 11)
    index = torch.randint(4, (*shape[:2], 3))  # nobody chooses the last
    expected = one_by_one(x, weight, index)
    assert relative_error(expert_linear(x, weight, index, exact), expected) < 1e-6


@pytest.mark.parametrize("shape", [(2, 63, 12), (2, 63, 3, 12)])
@pytest.mark.parametrize("one_scale", [False, True])
def test_integers_give_the_same_bits(shape: tuple[int, ...], one_scale: bool) -> None:
    index = torch.randint(5, (2, 63, 3))
    x_q, x_scale = quantize_dynamic(torch.randn(shape))
    pair = quantize_weight(torch.randn(45, 12), "tensor" if one_scale else "channel")
    w_q, w_scale = (t.unflatten(0, (5, 9)) if t.dim() else t for t in pair)
    expected = expert_linear(dequantize(x_q, x_scale), dequantize(w_q, w_scale), index, True)
    assert torch.equal(int8_expert_linear(x_q, x_scale, w_q, w_scale, index), expected)


def test_every_row_through_every_expert() -> None:
    x, weight, index = torch.randn(2, 63, 12), torch.randn(5, 9, 12), torch.randint(4, (2, 63, 3))

    def product(rows: Tensor, expert: int) -> Tensor:
        return rows @ weight[expert].T

    found = by_expert(product, index, 5, 9, x, every_row=True)
    assert relative_error(found, one_by_one(x, weight, index)) < 1e-6


def test_groups_of_stacked_weights() -> None:
    weight = torch.randn(5, 9, 16)
    stacked = (t.unflatten(0, (5, 9)) for t in quantize_groups(weight.flatten(0, 1), 8))
    each = torch.stack([dequantize_groups(*quantize_groups(w, 8)) for w in weight])
    assert torch.equal(dequantize_groups(*stacked), each)


def test_top_k() -> None:
    values, index = top_k(torch.tensor([[[0.1, 0.5, 0.4], [3.0, 1.0, 2.0]]]), 2)
    assert index.tolist() == [[[1, 2], [0, 2]]]
    assert torch.equal(values, torch.tensor([[[0.5, 0.4], [3.0, 2.0]]]))


@pytest.mark.parametrize(
    ("x", "weight", "index", "message"),
    [
        ((2, 5, 12), (4, 7, 11), (2, 5, 3), "weight has shape"),
        ((2, 5, 12), (4, 7, 12), (2, 4, 3), "index has shape"),
        ((2, 5, 2, 12), (4, 7, 12), (2, 5, 3), "x has shape"),
        ((2, 5, 12), (7, 12), (2, 5, 3), "x has 3 dimensions and weight 2"),
    ],
)
def test_operands_that_do_not_fit(
    x: tuple[int, ...], weight: tuple[int, ...], index: tuple[int, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        expert_linear(torch.zeros(x), torch.zeros(weight), torch.zeros(index).long())
