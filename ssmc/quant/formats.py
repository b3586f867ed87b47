"""The one definition of quantised arithmetic: symmetric integers with bfloat16-valued scales.

A scale with 8 significant bits makes `q * scale` exact in float32 and sums of such products exact
in float64, which is what lets simulated and integer execution agree bit for bit.
"""

from __future__ import annotations

import functools
import operator
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


def quantize_tensor(x: Tensor, scale: Tensor, bits: int = 8, lowest: int | None = None) -> Tensor:
    """clamp(rint(x * (1 / scale)), lowest, qmax) as int8; half to even, all in float32.

    x float32 of any shape, scale broadcasts against it. The inverse is rounded once, then
    multiplied, as kernels do it. The range is symmetric, unless `lowest` is given.
    """
    limit = qmax(bits)
    whole = (x * scale.reciprocal()).round_()
    return whole.clamp_(-limit if lowest is None else lowest, limit).to(torch.int8)


def dequantize_tensor(q: Tensor, scale: Tensor) -> Tensor:
    """Return q * scale as float32; scale broadcasts. Exact for scales made by `scale_for`."""
    return q * scale.float()


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


def _planes(bits: int) -> list[int]:
    """The widths that the bits are stored in, low bits first: 3 bits as 2 and 1."""
    qmax(bits)  # refuses what is no width
    return [width for width in (8, 4, 2, 1) if bits & width]


def columns_packed(bits: int) -> int:
    """How many integers fill whole bytes: a packed group is a multiple of this."""
    return 8 // min(_planes(bits))


def pack(q: Tensor, bits: int, group: int) -> Tensor:
    """Integers q int8 [N, K] of `bits` bits as uint8 [N, K * bits / 8].

    A group has its own bytes, `group * bits / 8` of them; it is a multiple of `columns_packed`.
    Plus 2^(bits - 1), an integer is split into planes of 4, 2 and 1 bits, lowest first. In the
    plane of 8 / n bits, byte j of m holds columns j, j + m, j + 2 m, ..., the first in its lowest
    bits, so that each share unpacks to columns that follow one another.
    """
    raised = (q.view(len(q), -1, group).to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    parts, shift = [], 0
    for width in _planes(bits):
        plane = (raised >> shift) & ((1 << width) - 1)
        shares = plane.unflatten(2, (8 // width, -1)).unbind(2)
        parts.append(
            functools.reduce(operator.or_, (s << (i * width) for i, s in enumerate(shares)))
        )
        shift += width
    return torch.cat(parts, 2).flatten(1)


def unpack(packed: Tensor, bits: int, group: int) -> Tensor:
    """The inverse of `pack`: uint8 [N, K * bits / 8] to int8 [N, K]."""
    widths = _planes(bits)
    runs = packed.view(len(packed), -1, group * bits // 8)
    planes, shift = [], 0
    for width, part in zip(widths, runs.split([group * w // 8 for w in widths], 2), strict=True):
        shares = torch.cat([part >> (i * width) for i in range(8 // width)], 2)
        planes.append((shares & ((1 << width) - 1)) << shift)
        shift += width
    raised = functools.reduce(operator.or_, planes)
    return (raised.to(torch.int16) - (1 << (bits - 1))).to(torch.int8).flatten(1)
