"""What stands between the products of gated MLPs and of mixtures of experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmc.ops.experts import int8_expert_linear, top_k
from ssmc.ops.hadamard import hadamard
from ssmc.ops.quantize import quantize_dynamic
from ssmc.ops.registry import operator


@operator(lambda gate, up, block=1: quantize_dynamic(gate))
def silu_mul_quantize(gate: Tensor, up: Tensor, block: int = 1) -> tuple[Tensor, Tensor]:
    """silu(gate) * up, rotated by `hadamard` where block > 1, and quantised.

    gate and up [..., D]; (q int8 [..., D], scale [..., 1]).
    """
    y = F.silu(gate) * up
    return quantize_dynamic(y if block == 1 else hadamard(y, block))


@operator(lambda x, k: top_k(x, k))
def softmax_top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`top_k` of the softmax of x [..., E]: (values [..., k], index int64 [..., k])."""
    return top_k(torch.softmax(x, -1), k)


def _sum_fake(*args: Any) -> Tensor:
    y = int8_expert_linear(*args[:5])  # checks them
    return y.new_empty((*y.shape[:2], y.shape[-1]))


@operator(_sum_fake)
def int8_expert_linear_sum(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    index: Tensor,
    weights: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    """`int8_expert_linear` summed over a token's experts with weights [B, L, k]; [B, L, N].

    That is added to the residual [B, L, N], if there is one.
    """
    y = (int8_expert_linear(x_q, x_scale, w_q, w_scale, index) * weights.unsqueeze(-1)).sum(2)
    return y if residual is None else residual + y
