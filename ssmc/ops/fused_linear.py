"""int8 products with what follows them in the epilogue: a sum, or the next quantisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ssmc.ops.int8 import int8_linear
from ssmc.ops.quantize import quantize, quantize_dynamic
from ssmc.ops.registry import composite, operator


def _add_fake(*args: Any) -> Tensor:
    *product, residual = args
    int8_linear(*product)  # checks them
    empty: Tensor = residual.new_empty(residual.shape)
    return empty


@operator(_add_fake)
def int8_linear_add(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
) -> Tensor:
    """residual [..., N] + `int8_linear`; float32 [..., N]."""
    return residual + int8_linear(x_q, x_scale, w_q, w_scale, bias)


@composite
def int8_linear_quantize(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
) -> Tensor:
    """`int8_linear` rounded to int8 [..., N] with a static scale a channel, out_scale [N]."""
    return quantize(int8_linear(x_q, x_scale, w_q, w_scale, bias), out_scale)


@composite
def int8_linear_split(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
) -> list[Tensor]:
    """`int8_linear` split into segments of `sizes` channels, each quantised with a scale a token.

    Returns [q_0, scale_0, q_1, scale_1, ...]: q_i int8 [..., sizes[i]], scale_i [..., 1].
    """
    parts = int8_linear(x_q, x_scale, w_q, w_scale, bias).split(list(sizes), -1)
    return [tensor for part in parts for tensor in quantize_dynamic(part)]
