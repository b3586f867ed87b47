"""Kernels of gates, routers and experts for the CPU."""

from __future__ import annotations

import pytest
import torch

from ssmc import ops
from ssmc.quant.formats import quantize_weight

from .test_kernels import check, integers, kernel, scales

pytest.importorskip("numba")


@pytest.mark.parametrize(("n", "block"), [(63, 1), (384, 384), (1000, 8), (17, 1)])
@pytest.mark.parametrize("tokens", [1, 33])
def test_gates_that_are_halves_of_a_tensor(n: int, block: int, tokens: int) -> None:
    gate, up = torch.randn(2, tokens, 2 * n).split([n, n], -1)
    check("silu_mul_quantize", gate, up, block)
    check("silu_mul_quantize", 50 * gate, up.contiguous(), block)


@pytest.mark.parametrize(("experts", "k"), [(4, 2), (64, 8), (5, 5), (1, 1)])
def test_routers(experts: int, k: int) -> None:
    x = 3 * torch.randn(2, 9, experts)
    values, index = kernel("softmax_top_k")(x, k)
    expected, expected_index = ops.softmax_top_k(x, k)
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)


def test_routers_choose_experts_once_where_all_are_alike() -> None:
    values, index = kernel("softmax_top_k")(torch.zeros(1, 2, 6), 4)
    assert index.tolist() == [[[0, 1, 2, 3]] * 2]
    assert torch.all(values == values[0, 0, 0])


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(("n", "k"), [(40, 63), (48, 192), (7, 5)])
def test_sums_over_experts(n: int, k: int, each: bool) -> None:
    index = torch.stack([torch.randperm(6)[:3] for _ in range(10)]).view(2, 5, 3)
    x = torch.randn(2, 5, 3, k) if each else torch.randn(2, 5, k)
    w_q, w_scale = (t.unflatten(0, (6, n)) for t in quantize_weight(torch.randn(6 * n, k)))
    args = (*ops.quantize_dynamic(x), w_q, w_scale, index)
    check("int8_expert_linear", *args)
    check("int8_expert_linear_sum", *args, torch.rand(2, 5, 3))
    check("int8_expert_linear_sum", *args, torch.rand(2, 5, 3), torch.randn(2, 5, 2 * n)[..., n:])


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(("tokens", "n", "k"), [(30, 70, 63), (370, 48, 64), (20, 5, 130)])
def test_experts_of_many_tokens_are_tiles(tokens: int, n: int, k: int, each: bool) -> None:
    experts, chosen = 5, 3  # of which one is never chosen, and the last by all
    w, w_scale = (
        t.unflatten(0, (experts, n)) for t in quantize_weight(torch.randn(experts * n, k))
    )
    index = torch.rand(2, tokens, experts - 2).topk(chosen - 1).indices
    index = torch.cat([index, torch.full((2, tokens, 1), experts - 1)], -1)
    rows = (chosen, k) if each else (k,)
    args = (integers(2, tokens, *rows), scales(2, tokens, *rows[:-1], 1), w, w_scale, index)
    check("int8_expert_linear", *args)
    weights, residual = torch.rand(2, tokens, chosen), torch.randn(2, tokens, 2 * n)[..., n:]
    check("int8_expert_linear_sum", *args, weights, residual)
    few = kernel("int8_expert_linear_sum")(args[0][:, :1], args[1][:, :1], w, w_scale, index[:, :1],
                                           weights[:, :1])  # fmt: skip
    many = kernel("int8_expert_linear_sum")(*args, weights)
    assert torch.equal(few, many[:, :1])  # a token has the same bits alone
