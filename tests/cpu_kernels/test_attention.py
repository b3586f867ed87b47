"""Kernels of attention for the CPU, over caches of many rows, and what is written into caches."""

from __future__ import annotations

import pytest
import torch

from ssmc import ops
from ssmc.errors import UsageError

from .test_kernels import check, integers, kernel

pytest.importorskip("numba")


@pytest.mark.parametrize("length", [1, 3, 9])
@pytest.mark.parametrize(
    ("heads", "groups", "width", "out", "room"),
    [
        (4, 2, 64, 64, 40),
        (6, 3, 63, 17, 16),
        (3, 1, 16, 100, 130),
        (2, 2, 5, 1, 9),
        (20, 1, 8, 8, 70),
    ],
)
def test_attention(length: int, heads: int, groups: int, width: int, out: int, room: int) -> None:
    q, position = torch.randn(2, length, heads, width), torch.tensor([0, room - length])
    k, v = torch.randn(2, room, groups, width), torch.randn(2, room, groups, out)
    check("attention", q, k, v, position)
    check("attention", 100 * q, k, v, position, 0.5)  # nearly all weight on one row
    k_pair, v_pair = ops.quantize_dynamic(k), ops.quantize_dynamic(v)
    check("int8_attention", q, *k_pair, *v_pair, position)
    halves = [(values, scale.bfloat16()) for values, scale in (k_pair, v_pair)]
    check("int8_attention", q, *halves[0], *halves[1], position, 0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_rounded_in_place(dtype: torch.dtype) -> None:
    cache, scales = integers(3, 6, 2, 17), torch.rand(3, 6, 2, 1).to(dtype)
    x, position = torch.randn(3, 1, 2, 17), torch.tensor([5, 0, 3])
    expected = ops.cache_quantize_step(cache, scales, x, position)
    new, new_scales = kernel("cache_quantize_step")(cache, scales, x, position)
    assert new is cache
    assert new_scales is scales
    assert torch.equal(new, expected[0])
    assert torch.equal(new_scales, expected[1])


def test_rows_behind_a_token_are_not_looked_at() -> None:
    q, position = torch.randn(1, 1, 2, 32), torch.tensor([20])
    k, v = torch.randn(2, 1, 64, 2, 32)
    expected = kernel("attention")(q, k, v, position)
    k[:, 21:], v[:, 21:] = torch.nan, torch.nan
    assert torch.equal(kernel("attention")(q, k, v, position), expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_token_has_the_same_bits_in_any_call(threads: int) -> None:
    q, start = torch.randn(1, 150, 4, 24), torch.zeros(1, dtype=torch.int64)
    k, v = torch.randn(2, 1, 150, 2, 24)
    whole = kernel("attention")(q, k, v, start)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for first, length in ((0, 1), (64, 1), (149, 1), (3, 20), (60, 90)):
            part = kernel("attention")(q[:, first : first + length], k, v, start + first)
            assert torch.equal(part, whole[:, first : first + length])
    finally:
        torch.set_num_threads(before)


def test_rotations_far_from_the_start() -> None:
    x, frequencies = torch.randn(2, 3, 4, 70), 10000.0 ** -(torch.arange(32) / 32)
    check("rotary_embedding", x, frequencies, torch.tensor([0, 262_000]))
    check("rotary_embedding", x[:, :1], frequencies, torch.tensor([3, 100_000]), 1.3)


@pytest.mark.parametrize(("place", "length"), [(0, 200), (63, 2), (64, 64), (130, 70), (199, 1)])
def test_rows_are_put_into_a_copy(place: int, length: int) -> None:
    cache, rows = torch.randn(2, 200, 3, 5), torch.randn(2, length, 3, 5)
    before = cache.clone()
    check("cache_append", cache, rows, torch.tensor([place, 200 - length]))
    assert torch.equal(cache, before)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_rows_and_counts_are_written_in_place(dtype: torch.dtype) -> None:
    cache, row = torch.ones(2, 6, 3, 5).to(dtype), torch.full((2, 1, 3, 5), 7).to(dtype)
    position = torch.tensor([5, 0])
    expected = ops.cache_append(cache, row, position)
    assert kernel("cache_append_step")(cache, row, position) is cache
    assert torch.equal(cache, expected)
    assert kernel("position_step")(position, 1) is position
    assert position.tolist() == [6, 1]
    with pytest.raises(UsageError, match="no room for 7"):
        kernel("cache_append_step")(cache, row, position)
