"""The one definition of quantised arithmetic: symmetric integers with bfloat16-valued scales.

A scale with 8 significant bits makes `q * scale` exact in float32 and sums of such products exact
in float64, which is what lets simulated and integer execution agree bit for bit.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ssmc.errors import UsageError

Granularity = Literal["channel", "tensor"]

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Floor of a scale: the smallest normal float32, whose inverse is still finite."""


def qmax(bits: int) -> int:
    """Largest magnitude of a symmetric integer of 2 to 8 bits; UsageError otherwise."""
    if not 2 <= bits <= 8:
        raise UsageError(f"cannot quantise to {bits} bits", hint="bits is 2 to 8")
    return (1 << (bits - 1)) - 1


def bf16_up(x: Tensor) -> Tensor:
    """The smallest bfloat16 value not below x, as float32; x is positive float32, any shape."""
    pattern = x.view(torch.int32)
    rounded = ((pattern + 0xFFFF) & ~0xFFFF).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)


def scale_for(absmax: Tensor, bits: int = 8) -> Tensor:
    """The scale that maps absmax (float32, any shape) onto the largest integer.

    bf16_up(absmax / qmax), at least SMALLEST_SCALE so that an all-zero range quantises to zeros.
    """
    # Dividing by a tensor, since CUDA divides by a number through its rounded reciprocal.
    limit = torch.full_like(absmax, qmax(bits))
    return bf16_up(absmax / limit).clamp(min=SMALLEST_SCALE)


def quantize_tensor(x: Tensor, scale: Tensor, bits: int = 8) -> Tensor:
    """clamp(rint(x * (1 / scale)), -qmax, qmax) as int8; half to even, all in float32.

    x float32 of any shape, scale broadcasts against it. The inverse is rounded once, then
    multiplied, as kernels do it.
    """
    limit = qmax(bits)
    return torch.round(x * scale.reciprocal()).clamp(-limit, limit).to(torch.int8)


def dequantize_tensor(q: Tensor, scale: Tensor) -> Tensor:
    """Return q * scale as float32; scale broadcasts. Exact for scales made by `scale_for`."""
    return q.float() * scale


def quantize_weight(
    weight: Tensor, granularity: Granularity = "channel", bits: int = 8
) -> tuple[Tensor, Tensor]:
    """Round weight [N, K] to (q int8, scale): scale [N, 1] a 'channel', [] a 'tensor'."""
    magnitude = weight.abs()
    if granularity == "channel":
        absmax = magnitude.amax(1, keepdim=True)
    elif granularity == "tensor":
        absmax = magnitude.amax()
    else:
        raise UsageError(f"unknown granularity '{granularity}'", hint="'channel' or 'tensor'")
    scale = scale_for(absmax, bits)
    return quantize_tensor(weight, scale, bits), scale


def pack_int4(q: Tensor, group: int) -> Tensor:
    """Integers of 4 bits, q int8 [N, K] in -8..7, as uint8 [N, K / 2]; group even.

    Byte j of a group holds column j in its low four bits and column j + group / 2 in its high ones,
    each plus 8: so that either half unpacks to columns that follow one another.
    """
    low, high = (q.view(len(q), -1, 2, group // 2) + 8).to(torch.uint8).unbind(2)
    return (low | high << 4).flatten(1)


def unpack_int4(packed: Tensor, group: int) -> Tensor:
    """The inverse of `pack_int4`: uint8 [N, K / 2] to int8 [N, K]."""
    halves = packed.view(len(packed), -1, group // 2)
    return (torch.stack([halves & 15, halves >> 4], 2).to(torch.int8) - 8).flatten(1)


def quantize_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Round weight [N, K] to 4 bits: (packed uint8 [N, K / 2], scale [N, K / group])."""
    runs = weight.unflatten(1, (-1, group))
    scale = scale_for(runs.abs().amax(2), bits=4)
    return pack_int4(quantize_tensor(runs, scale.unsqueeze(2), bits=4).flatten(1), group), scale


def dequantize_groups_tensor(packed: Tensor, scale: Tensor) -> Tensor:
    """The inverse of `quantize_groups` up to its rounding: float32 [N, K], exact."""
    group = 2 * packed.shape[1] // scale.shape[1]
    q = unpack_int4(packed, group).unflatten(1, (-1, group))
    return dequantize_tensor(q, scale.unsqueeze(2)).flatten(1)
