"""Linear projection and embedding lookup."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmc.ops.registry import expect_shape, operator

PIECE = 2**20
"""Values that are in float64 at a time, of a weight or of a product."""


def check_linear(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise UsageError, naming `op`, unless weight is [N, K] for x [..., K] and bias [N]."""
    expect_shape(op, "weight", weight, (weight.shape[0], x.shape[-1]))
    expect_shape(op, "bias", bias, (weight.shape[0],))


def linear_fake(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Empty float32 [..., N] for x [..., K] and weight [N, K]; checks the operands."""
    check_linear(op, x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)


@operator(lambda x, weight, bias=None, *_: linear_fake("linear", x, weight, bias))
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, exact: bool = False) -> Tensor:
    """Multiply x [..., K] with the transpose of weight [N, K], add bias [N]; returns [..., N].

    With `exact`, products accumulate in float64 and round once to float32 before the bias is
    added. Where both operands are int8 times bfloat16-valued scales (one a row) the float64 sum
    has no rounding, so that any order of summation, integers included, gives the same bits.
    Without it they are the matrix product's, whose order may depend on how many rows x has.
    """
    check_linear("linear", x, weight, bias)
    if not exact:
        return F.linear(x, weight, bias)
    y = exact_product(x, weight)
    return y if bias is None else y + bias


def exact_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] times the transpose of weight [N, K]: summed in float64, rounded to float32.

    Some rows of the weight at a time: what is of float64 would take more than all else.
    """
    x = x.double()
    rows = max(1, PIECE // max(x.numel() // x.shape[-1], x.shape[-1]))
    if len(weight) <= rows:
        return (x @ weight.double().T).float()
    y = x.new_empty((*x.shape[:-1], len(weight)), dtype=torch.float32)
    for first in range(0, len(weight), rows):
        part = slice(first, first + rows)
        y[..., part] = x @ weight[part].double().T
    return y


@operator(lambda ids, weight: weight.new_empty((*ids.shape, weight.shape[1])))
def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight [V, D] chosen by ids (int64, [B, L]); returns [B, L, D]."""
    return F.embedding(ids, weight)
