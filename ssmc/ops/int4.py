"""Products with weights of 4 bits and activations of 16: only the weight is quantised."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmc.ops.registry import expect_shape, operator
from ssmc.quant.weights import dequantize_packed


def _fake(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    expect_shape("int4_linear", "w_q", w_q, (w_q.shape[0], x.shape[-1] // 2))
    expect_shape("int4_linear", "bias", bias, (w_q.shape[0],))
    return x.new_empty((*x.shape[:-1], w_q.shape[0]))


@operator(_fake)
def int4_linear(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` of x [..., K], rounded to bfloat16, and a weight of 4 bits; float32 [..., N].

    x float32, w_q uint8 [N, K / 2] of groups (`ssmc.quant.formats.pack`), w_scale
    [N, K / group], bias [N] float32. The products are summed in float64 and rounded once.
    """
    _fake(x, w_q, w_scale, bias)
    weight = dequantize_packed(w_q, w_scale)
    y = (x.to(torch.bfloat16).double() @ weight.double().T).float()
    return y if bias is None else y + bias
