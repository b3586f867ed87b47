"""Mixtures of experts: the choice of experts, and products with the weights of those chosen."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmc.errors import UsageError
from ssmc.ops.linear import exact_product
from ssmc.ops.registry import expect_shape, operator


@operator(lambda x, k: (x.new_empty((*x.shape[:-1], k)), x.new_empty((*x.shape[:-1], k)).long()))
def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of x [..., E], largest first, and where they are: [..., k], int64 [..., k]."""
    values, index = torch.topk(x, k, dim=-1)
    return values, index


def check_experts(op: str, x: Tensor, weight: Tensor, index: Tensor) -> None:
    """Raise UsageError, naming `op`, unless weight [E, N, K] and index [B, L, k] fit x."""
    if x.dim() not in (3, 4) or weight.dim() != 3:
        raise UsageError(
            f"ssmc::{op}: x has {x.dim()} dimensions and weight {weight.dim()}",
            hint="x is [B, L, K] or [B, L, k, K], weight [E, N, K]",
        )
    expect_shape(op, "weight", weight, (*weight.shape[:2], x.shape[-1]))
    expect_shape(op, "index", index, (*x.shape[:2], index.shape[-1]))
    if x.dim() == 4:
        expect_shape(op, "x", x, (*index.shape, x.shape[-1]))


def experts_fake(op: str, x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """Empty float32 [B, L, k, N]; checks the operands."""
    check_experts(op, x, weight, index)
    return x.new_empty((*index.shape, weight.shape[1]), dtype=torch.float32)


@operator(lambda x, weight, index, *_: experts_fake("expert_linear", x, weight, index))
def expert_linear(x: Tensor, weight: Tensor, index: Tensor, exact: bool = False) -> Tensor:
    """Multiply each token with the transposes of the weights of its experts; no bias.

    x [B, L, K], the same for all experts of a token, or [B, L, k, K]; weight [E, N, K], one matrix
    an expert; index int64 [B, L, k]: which experts. Returns [B, L, k, N]. `exact` as in `linear`.
    """
    check_experts("expert_linear", x, weight, index)

    def product(rows: Tensor, expert: int) -> Tensor:
        if not exact:
            return F.linear(rows, weight[expert])
        return exact_product(rows, weight[expert])

    return by_expert(product, index, len(weight), weight.shape[1], x)


def by_expert(
    product: Callable[..., Tensor],
    index: Tensor,
    experts: int,
    width: int,
    *values: Tensor,
    every_row: bool | None = None,
) -> Tensor:
    """`product(*rows, expert)` of the rows that chose each expert: float32 [B, L, k, width].

    `values` are [B, L, C], the same for all k, or [B, L, k, C]; index is [B, L, k]. With
    `every_row` an expert has all rows, of which those are kept that chose it: by default on a GPU,
    which would be waited for otherwise.
    """
    chosen = index.flatten()
    y = torch.zeros((len(chosen), width), dtype=torch.float32, device=index.device)
    per_choice = [v.unsqueeze(2) if v.dim() == 3 else v for v in values]
    flat = [v.expand(*index.shape, v.shape[-1]).reshape(len(chosen), -1) for v in per_choice]
    for expert in range(experts):
        mine = chosen == expert
        if index.is_cuda if every_row is None else every_row:
            y = torch.where(mine.unsqueeze(1), product(*flat, expert), y)
        else:
            rows = mine.nonzero().squeeze(1)
            y[rows] = product(*(value[rows] for value in flat), expert)
    return y.unflatten(0, index.shape)


@operator(
    lambda x_q, x_scale, w_q, w_scale, index: experts_fake("int8_expert_linear", x_q, w_q, index)
)
def int8_expert_linear(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, index: Tensor
) -> Tensor:
    """`expert_linear` of int8 x_q and w_q [E, N, K]; float32 [B, L, k, N].

    x_scale [] or with a size of one for the channels of x_q, w_scale [] or [E, N, 1].
    """
    check_experts("int8_expert_linear", x_q, w_q, index)
    x_scale = x_scale.expand(*x_q.shape[:-1], 1)
    w_scale = w_scale.expand(*w_q.shape[:-1], 1)

    def product(rows: Tensor, scale: Tensor, expert: int) -> Tensor:
        total = rows.double() @ w_q[expert].double().T
        return (total * (scale.double() * w_scale[expert].double().squeeze(-1))).float()

    return by_expert(product, index, len(w_q), w_q.shape[1], x_q, x_scale)
