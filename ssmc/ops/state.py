"""States of scans between calls as integers; the arithmetic is in ssmc.quant.state."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmc.errors import UsageError
from ssmc.ops.registry import expect_shape, operator
from ssmc.quant.state import (
    dequantize_state_tensor,
    is_packed,
    quantize_state_tensor,
    uniform_noise,
)


def _check(h: Tensor, scales: str, group: int, step: Tensor | None) -> None:
    expect_shape("quantize_state", "step", step, (h.shape[0], 1))
    if h.dim() < 3:
        raise UsageError(
            f"ssmc::quantize_state: h has shape {list(h.shape)}",
            hint="a state is [batch, channels, state dimension], with heads before the channels",
        )
    if scales == "group" and h.shape[-1] % group:
        raise UsageError(
            f"ssmc::quantize_state: groups of {group} do not divide a state of {h.shape[-1]}"
        )


def _scale_shape(h: Tensor, scales: str, group: int) -> tuple[int, ...]:
    if scales == "tensor":
        return (h.shape[0], *[1] * (h.dim() - 1))
    if scales == "group":
        return (*h.shape[:-1], h.shape[-1] // group)
    return (*h.shape[:-2], h.shape[-2] + h.shape[-1])


def _fake(
    h: Tensor, bits: int, scales: str, group: int, step: Tensor | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    _check(h, scales, group, step)
    scale = h.new_empty(_scale_shape(h, scales, group), dtype=torch.bfloat16)
    if is_packed(bits, h.shape[-1]):
        return h.new_empty((*h.shape[:-1], h.shape[-1] // 2), dtype=torch.uint8), scale
    return h.new_empty(h.shape, dtype=torch.int8), scale


@operator(_fake)
def quantize_state(
    h: Tensor, bits: int, scales: str, group: int, step: Tensor | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A state h [B, ..., P, N] as integers of 2 to 8 bits and their scales, made from h itself.

    `scales` is 'tensor' (scale [B, 1, ...]), 'group' ([..., P, N / group]), 'decoupled' or
    'decoupled-max' ([..., P + N]); scales are bfloat16. Integers are int8, or packed to uint8
    [..., N / 2] where bits is 4 or less and N even. With `step`, integers [B, 1] that count calls,
    rounding is stochastic, its numbers a hash of seed, step and place; else half to even.
    """
    _check(h, scales, group, step)
    noise = None if step is None else uniform_noise(step, h.shape, seed)
    return quantize_state_tensor(h, bits, scales, group, noise)


def _dequantize_fake(q: Tensor, scale: Tensor, scales: str) -> Tensor:
    width = q.shape[-1] * (2 if q.dtype == torch.uint8 else 1)
    return q.new_empty((*q.shape[:-1], width), dtype=torch.float32)


@operator(_dequantize_fake)
def dequantize_state(q: Tensor, scale: Tensor, scales: str) -> Tensor:
    """The float32 state [B, ..., P, N] of `quantize_state`; exact. Zeros for a fresh sequence."""
    return dequantize_state_tensor(q, scale, scales)
