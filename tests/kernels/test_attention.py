"""Attention over caches, rotations and appended rows, against the operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmc import ops
from ssmc.errors import UsageError
from ssmc.kernels import attention as kernels
from ssmc.kernels.attention import attention, int8_attention
from ssmc.kernels.cache import cache_append, cache_append_step
from ssmc.kernels.rotary import rotary_embedding

ERROR = 1e-5  # relative; exponentials, and sums in another order

# Sequences, tokens, heads, heads of keys, channels of keys and values, room, positions.
SHAPES = {
    "one token, each head its own keys": (2, 1, 2, 2, 16, 16, 70, (0, 69)),
    "one token, widths of no power of two": (2, 1, 4, 2, 20, 24, 70, (3, 50)),
    "many rows, in parts": (1, 1, 8, 2, 32, 32, 900, (700,)),
    "fewer rows than parts": (1, 1, 2, 1, 16, 16, 900, (5,)),
    "a prompt": (2, 37, 6, 3, 16, 24, 90, (0, 50)),
    "a prompt of several tiles": (1, 70, 2, 1, 16, 16, 150, (64,)),
}


def operands(device: torch.device, shape: tuple) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, heads, groups, width, out, room, positions = shape
    q = torch.randn(batch, length, heads, width, device=device)
    k = torch.randn(batch, room, groups, width, device=device)
    v = torch.randn(batch, room, groups, out, device=device)
    return q, k, v, torch.tensor(positions, device=device)


def agree(got: Tensor, expected: Tensor) -> None:
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert (got.double() - expected.double()).norm() <= ERROR * expected.double().norm()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention(device: torch.device, shape: tuple) -> None:
    q, k, v, position = operands(device, shape)
    for row, start in enumerate(position.tolist()):
        k[row, start + q.shape[1] :] = torch.inf  # rows that nothing looks at may hold anything
        v[row, start + q.shape[1] :] = torch.nan
    seen = [x.nan_to_num(0, 0, 0) for x in (k, v)]
    agree(attention(q, k, v, position), ops.attention(q, *seen, position))
    agree(attention(q, k, v, position, 0.3), ops.attention(q, *seen, position, 0.3))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16])
def test_int8_attention(device: torch.device, shape: tuple, scales: torch.dtype) -> None:
    q, k, v, position = operands(device, shape)
    (k_q, k_scale), (v_q, v_scale) = ops.quantize_dynamic(k), ops.quantize_dynamic(v)
    given = (q, k_q, k_scale.to(scales), v_q, v_scale.to(scales), position)
    agree(int8_attention(*given), ops.int8_attention(*given))


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_int8_attention_of_values_of_any_size(device: torch.device, size: float) -> None:
    q, k, v, position = operands(device, SHAPES["a prompt"])
    (k_q, k_scale), (v_q, v_scale) = ops.quantize_dynamic(k / size), ops.quantize_dynamic(v * size)
    given = (q * size, k_q, k_scale, v_q, v_scale, position)
    agree(int8_attention(*given), ops.int8_attention(*given))


def test_rows_are_shared_where_queries_are_few() -> None:
    assert kernels._parts(1, 64) == 1
    assert kernels._parts(2, 8192) == 64
    assert kernels._parts(500, 8192) == 1


def test_heads_that_do_not_fit_are_refused(device: torch.device) -> None:
    q, k, v, position = operands(device, (1, 1, 3, 2, 16, 16, 8, (0,)))
    with pytest.raises(UsageError, match="2 heads of keys do not divide 3"):
        attention(q, k, v, position)


@pytest.mark.parametrize(("width", "pairs"), [(16, 8), (20, 4), (64, 32)])
def test_rotary_embedding(device: torch.device, width: int, pairs: int) -> None:
    x = torch.randn(2, 5, 3, width, device=device)
    frequencies = 10000 ** -torch.linspace(0, 1, pairs, device=device)
    position = torch.tensor([0, 300], device=device)
    agree(
        rotary_embedding(x, frequencies, position, 1.1),
        ops.rotary_embedding(x, frequencies, position, 1.1),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_rows_are_appended(device: torch.device, dtype: torch.dtype) -> None:
    cache = torch.randn(2, 9, 3, 20, device=device).mul(50).to(dtype)
    x = torch.randn(2, 2, 3, 20, device=device).mul(50).to(dtype)
    position = torch.tensor([0, 7], device=device)
    before = cache.clone()
    expected = ops.cache_append(cache, x, position)
    assert torch.equal(cache_append(cache, x, position), expected)
    assert torch.equal(cache, before)
    step = cache_append_step(cache, x[:, :1], position)
    assert step.data_ptr() == cache.data_ptr()
    assert torch.equal(cache, ops.cache_append(before, x[:, :1], position))
