"""Between float32 and symmetric integers; the arithmetic is in ssmc.quant.formats."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmc.ops.registry import operator
from ssmc.quant.formats import dequantize_tensor, quantize_tensor, scale_for


@operator(lambda x, scale, bits=8: torch.empty_like(x, dtype=torch.int8))
def quantize(x: Tensor, scale: Tensor, bits: int = 8) -> Tensor:
    """Round x to int8 with a static scale, [] or broadcast on the last dimensions ([C])."""
    return quantize_tensor(x, scale, bits)


def _dynamic_fake(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1))


@operator(_dynamic_fake)
def quantize_dynamic(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Round x [..., C] to int8 with one scale a token: (q [..., C], scale float32 [..., 1])."""
    scale = scale_for(x.abs().amax(-1, keepdim=True), bits)
    return quantize_tensor(x, scale, bits), scale


@operator(lambda q, scale: torch.empty_like(q, dtype=torch.float32))
def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """Return q * scale in float32; exact, because a scale has 8 significant bits."""
    return dequantize_tensor(q, scale)
