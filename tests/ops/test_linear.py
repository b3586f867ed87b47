import importlib

import pytest
import torch

from ssmc.ops import embedding, linear
from ssmc.quant.formats import dequantize_tensor, quantize_weight

from .closeness import relative_error

linear_module = importlib.import_module("ssmc.ops.linear")  # whose name the operator has


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shape", [(1000,), (63, 1000), (2, 3, 1000)])
def test_linear_against_float64(shape: tuple[int, ...], exact: bool) -> None:
    x, weight, bias = torch.randn(shape), torch.randn(63, 1000), torch.randn(63)
    expected = torch.einsum("...k,nk->...n", x.double(), weight.double()) + bias
    assert relative_error(linear(x, weight, bias, exact), expected) < 1e-6


def test_exact_rounds_once() -> None:
    x, weight = torch.randn(31, 257), torch.randn(17, 257)
    expected = torch.einsum("mk,nk->mn", x.double(), weight.double()).float()
    assert torch.equal(linear(x, weight, exact=True), expected)


def test_exact_does_not_depend_on_the_order_of_summation() -> None:
    width = 8192
    rows = [dequantize_tensor(*quantize_weight(torch.randn(19, width) ** 3)) for _ in range(2)]
    order = torch.randperm(width)
    shuffled = [row[:, order] for row in rows]
    assert torch.equal(linear(*rows, exact=True), linear(*shuffled, exact=True))


@pytest.mark.parametrize("shape", [(31,), (5, 31), (2, 5, 31)])
def test_exact_in_pieces_is_the_whole(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = torch.randn(shape), torch.randn(29, 31), torch.randn(29)
    whole = linear(x, weight, bias, exact=True)
    monkeypatch.setattr(linear_module, "PIECE", 100)  # three rows of the weight
    assert torch.equal(linear(x, weight, bias, exact=True), whole)


def test_embedding_picks_rows() -> None:
    weight = torch.randn(11, 5)
    ids = torch.tensor([[3, 0, 10], [3, 3, 1]])
    assert torch.equal(embedding(ids, weight), weight[ids])
