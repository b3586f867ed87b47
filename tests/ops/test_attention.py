"""Attention, its cache and its rotations against their definitions, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ssmc.errors import UsageError
from ssmc.ops import attention, cache_append, rotary_embedding

from .closeness import relative_error


def one_by_one(q: Tensor, k: Tensor, v: Tensor, position: Tensor, scale: float) -> Tensor:
    """Equation 1 of Vaswani et al. for each sequence, token and head."""
    y = torch.empty(*q.shape[:3], v.shape[-1])
    shared = q.shape[2] // k.shape[2]
    for b, t, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        seen = slice(0, int(position[b]) + t + 1)
        keys, values = k[b, seen, h // shared], v[b, seen, h // shared]
        y[b, t, h] = (keys @ q[b, t, h] * scale).softmax(0) @ values
    return y


@pytest.mark.parametrize(("heads", "groups"), [(6, 6), (6, 2), (3, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_is_its_definition(heads: int, groups: int, scale: float | None) -> None:
    q, k, v = (
        torch.randn(2, 5, heads, 7),
        torch.randn(2, 63, groups, 7),
        torch.randn(2, 63, groups, 9),
    )
    position = torch.tensor([58, 3])
    expected = one_by_one(q, k, v, position, scale or 1 / math.sqrt(7))
    assert relative_error(attention(q, k, v, position, scale), expected) < 1e-6


def test_rows_that_are_not_written_yet_are_not_looked_at() -> None:
    q, k, v = torch.randn(2, 3, 4, 6), torch.randn(2, 20, 2, 6), torch.randn(2, 20, 2, 6)
    position = torch.tensor([9, 5])
    expected = attention(q, k, v, position)
    k[0, 12:], v[0, 12:], k[1, 8:], v[1, 8:] = 3.0, 1e6, -7.0, 1e6
    assert torch.equal(attention(q, k, v, position), expected)


def test_a_cache_grows_by_rows() -> None:
    cache = torch.randn(2, 9, 3)
    x, position = torch.randn(2, 4, 3), torch.tensor([5, 0])
    before = cache.clone()
    longer = cache_append(cache, x, position)
    assert torch.equal(cache, before)
    assert torch.equal(longer[0], torch.cat([before[0, :5], x[0]]))
    assert torch.equal(longer[1], torch.cat([x[1], before[1, 4:]]))


def test_a_cache_without_room_says_so() -> None:
    with pytest.raises(UsageError, match="a cache of 9 tokens has no room for 10"):
        cache_append(torch.zeros(2, 9, 3), torch.zeros(2, 4, 3), torch.tensor([0, 6]))


def test_rotation_is_a_product_of_complex_numbers() -> None:
    x, position = torch.randn(2, 5, 3, 10), torch.tensor([0, 1000])
    frequencies = torch.rand(4)
    angles = (position[:, None] + torch.arange(5))[..., None, None].double() * frequencies.double()
    turned = torch.complex(x[..., :4].double(), x[..., 4:8].double()) * torch.exp(1j * angles)
    expected = torch.cat([turned.real, turned.imag, x[..., 8:]], -1).float()
    assert relative_error(rotary_embedding(x, frequencies, position), expected) < 1e-4
    half = rotary_embedding(x, frequencies, position, 0.5)
    assert relative_error(half[..., :8], expected[..., :8] / 2) < 1e-4
    assert torch.equal(half[..., 8:], x[..., 8:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, p: attention(q, k[..., :5], k, p), "k has shape"),
        (lambda q, k, p: attention(q, k, k[:, :3], p), "v has shape"),
        (lambda q, k, p: attention(q, k, k, p[:1]), "position has shape"),
        (lambda q, k, p: attention(q[:, :, :3], k, k, p), "2 heads of keys do not divide 3"),
        (lambda q, k, p: rotary_embedding(q, torch.rand(4), p), "frequencies .4. for heads of 6"),
        (lambda q, k, p: cache_append(k, q, p), "x has shape"),
    ],
)
def test_operands_that_do_not_fit(call: object, message: str) -> None:
    q, k, position = torch.randn(2, 5, 4, 6), torch.randn(2, 8, 2, 6), torch.tensor([0, 1])
    with pytest.raises(UsageError, match=message):
        call(q, k, position)  # type: ignore[operator]
