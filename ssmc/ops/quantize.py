"""Between float32 and symmetric integers; the arithmetic is in ssmc.quant.formats."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmc.ops.registry import operator
from ssmc.quant.formats import dequantize_tensor, quantize_tensor, scale_for
from ssmc.quant.weights import dequantize_packed


@operator(lambda x, scale, bits=8: x.new_empty(x.shape, dtype=torch.int8))
def quantize(x: Tensor, scale: Tensor, bits: int = 8) -> Tensor:
    """Round x to int8 with a static scale, [] or broadcast on the last dimensions ([C])."""
    return quantize_tensor(x, scale, bits)


def _dynamic_fake(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1))


@operator(_dynamic_fake)
def quantize_dynamic(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Round x [..., C] to int8 with one scale a token: (q [..., C], scale float32 [..., 1])."""
    scale = scale_for(x.abs().amax(-1, keepdim=True), bits)
    return quantize_tensor(x, scale, bits), scale


@operator(lambda q, scale: q.new_empty(q.shape, dtype=torch.float32))
def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """Return q * scale in float32; exact, because a scale has 8 significant bits."""
    return dequantize_tensor(q, scale)


def _groups_fake(packed: Tensor, scale: Tensor, bits: int = 4, tanh: bool = False) -> Tensor:
    return scale.new_empty((*packed.shape[:-1], packed.shape[-1] * 8 // bits))


@operator(_groups_fake)
def dequantize_groups(packed: Tensor, scale: Tensor, bits: int = 4, tanh: bool = False) -> Tensor:
    """The weight [..., N, K] float32 of integers of `bits` bits packed in groups (`pack`).

    packed uint8 [..., N, K * bits / 8], scale [..., N, K / group]. Exact, but for levels spaced
    by `tanh` (`ssmc.quant.weights.tanh_levels`), which are rounded to float32.
    """
    rows = dequantize_packed(packed.flatten(0, -2), scale.flatten(0, -2), bits, tanh)
    return rows.unflatten(0, packed.shape[:-1])
