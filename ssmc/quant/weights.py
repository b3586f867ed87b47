"""How a weight is quantised: bits, what shares a scale, which values the integers stand for."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ssmc.quant.formats import (
    SMALLEST_SCALE,
    bf16_up,
    columns_packed,
    dequantize_tensor,
    pack,
    qmax,
    quantize_tensor,
    scale_for,
    unpack,
)

Range = Literal["absmax", "mse", "tanh"]
_STORED = re.compile(r"(.*)_int([2-8])")

SIGMAS = 3.0
"""Where the range of tanh levels ends, in standard deviations."""
CANDIDATES = tuple(2 ** (-i / 8) for i in range(25))
"""Ranges tried for the least error, as fractions of the largest magnitude."""


def stored_name(name: str, bits: int) -> str:
    """The name of the integers of the weight called `name`."""
    return f"{name}_int{bits}"


def stored_weight(name: str) -> tuple[str, int] | None:
    """The weight whose integers are called `name`, and their bits; None for other tensors."""
    found = _STORED.fullmatch(name)
    return (found[1], int(found[2])) if found else None


@dataclass(frozen=True)
class WeightFormat:
    """A weight [N, K] as integers and scales [N, G].

    `group` input channels share a scale (G = K / group); None: a row (G = 1), or where `tensor`
    the whole weight, whose scale is then G = 1 times the same. The largest integer stands for the
    largest magnitude (`absmax`), or for what of it gives the least squared error (`mse`: Choukroun
    et al. 2019, arXiv 1902.06822, section 3). Integers are multiples of their scale, or with `tanh`
    stand for levels that are denser near zero (`tanh_levels`).

    Fewer than 8 bits with `mse` use the integer -2^(bits - 1) as well, which a symmetric range
    leaves out, and choose the sign of the scale, so that it reaches out to the side that needs it.
    That is one level of 16 more at 4 bits and one of four at 2. (The largest magnitude on the
    lowest integer: `quantize_row_q4_0` of llama.cpp; signed normalisation of Blumenberg et al.
    2025, arXiv 2505.06653.)
    """

    bits: int = 8
    group: int | None = None
    tensor: bool = False
    range: Range = "absmax"

    @property
    def packed(self) -> bool:
        """Whether the integers are stored packed; whole rows of uniform 8 bits are int8."""
        return self.bits < 8 or self.group is not None or self.range == "tanh"

    @property
    def lowest(self) -> int:
        """The lowest integer."""
        return -qmax(self.bits) - (self.range == "mse" and self.bits < 8)

    def fits(self, width: int) -> bool:
        """Whether a weight of `width` input channels divides into groups and whole bytes."""
        return width % (self.group or columns_packed(self.bits)) == 0

    def scales(self, weight: Tensor) -> Tensor:
        """The scales [N, G] of weight [N, K] float32, bfloat16 values all."""
        runs = self._runs(weight)
        largest = runs.abs().amax(2)
        if self.range == "tanh":
            sigma = runs.square().mean(2).sqrt()
            scale = bf16_up(largest.minimum(SIGMAS * sigma)).clamp(min=SMALLEST_SCALE)
        elif self.range == "mse":
            scale = self._of_least_error(runs, largest)
        else:
            scale = scale_for(largest, self.bits)
        return scale.expand(len(weight), -1).contiguous()

    def _runs(self, weight: Tensor) -> Tensor:
        """What shares a scale, last: [N, G, group], [N, 1, K] or [1, 1, N * K]."""
        if self.group:
            return weight.unflatten(1, (-1, self.group))
        return weight.reshape(1 if self.tensor else len(weight), 1, -1)

    def _of_least_error(self, runs: Tensor, largest: Tensor) -> Tensor:
        scales, errors = self._candidates(largest), []
        for scale in scales:
            s = scale.unsqueeze(2)
            rounded = dequantize_tensor(quantize_tensor(runs, s, self.bits, self.lowest), s)
            errors.append((rounded - runs).square().sum(2))
        best = torch.stack(errors).argmin(0, keepdim=True)
        return torch.stack(scales).gather(0, best).squeeze(0)

    def _candidates(self, largest: Tensor) -> list[Tensor]:
        """Scales that are tried: with a lowest integer of its own, of both signs, ending there."""
        end = qmax(self.bits) / -self.lowest
        scales = [scale_for(largest * (end * fraction), self.bits) for fraction in CANDIDATES]
        if end == 1:
            return scales
        return [scale_for(largest, self.bits), *scales, *(-scale for scale in scales)]

    def round(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The integers int8 [N, K] nearest to weight [N, K], saturating; scale [N, G]."""
        runs, scale = weight.unflatten(1, (scale.shape[1], -1)), scale.unsqueeze(2)
        if self.range == "tanh":
            runs = torch.tanh(SIGMAS * runs / scale) / math.tanh(SIGMAS) * qmax(self.bits)
            scale = torch.ones_like(scale)
        return quantize_tensor(runs, scale, self.bits, self.lowest).flatten(1)

    def values(self, q: Tensor, scale: Tensor) -> Tensor:
        """What integers [N, K] stand for, float32 [N, K]; scale [N, G]."""
        runs, scale = q.unflatten(1, (scale.shape[1], -1)), scale.unsqueeze(2)
        if self.range == "tanh":
            levels = tanh_levels(self.bits, q.device)
            return (levels[runs.int() + qmax(self.bits)] * scale).flatten(1)
        return dequantize_tensor(runs, scale).flatten(1)

    def store(self, q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Integers int8 [N, K] and scales [N, G] as a graph holds them.

        Packed uint8 [N, K * bits / 8] and [N, G]; or int8 [N, K] and [N, 1] (a tensor: []).
        """
        if self.packed:
            return pack(q, self.bits, self.group or q.shape[1]), scale
        return q, scale[0, 0].clone() if self.tensor else scale


def dequantize_packed(packed: Tensor, scale: Tensor, bits: int = 4, tanh: bool = False) -> Tensor:
    """The weight [N, K] float32 of packed uint8 [N, K * bits / 8] and scale [N, G].

    Exact for scales made by `WeightFormat.scales`, but for the rounding of tanh levels.
    """
    group = packed.shape[1] * 8 // bits // scale.shape[1]
    form = WeightFormat(bits, group, range="tanh" if tanh else "absmax")
    return form.values(unpack(packed, bits, group), scale)


def quantize_groups(weight: Tensor, group: int, bits: int = 4) -> tuple[Tensor, Tensor]:
    """Round weight [N, K] in groups: (packed uint8 [N, K * bits / 8], scale [N, K / group])."""
    form = WeightFormat(bits, group)
    scale = form.scales(weight)
    return form.store(form.round(weight, scale), scale)


def tanh_levels(bits: int, device: torch.device | str = "cpu") -> Tensor:
    """What -qmax .. qmax stand for, as fractions of the range: float32 [2 qmax + 1].

    atanh(tanh(3) q / qmax) / 3: uniform steps of the hyperbolic tangent of the weight over its
    standard deviation, which is clipped at three of them; the range is min(max|w|, 3 sigma). From
    M. Qu, "Post Training Quantization on Mamba State-Space Models" (github.com/mikequ1/PTQ-SSM,
    naive_quantization.ipynb), around zero instead of the mean, and without the second clip of the
    tangent at 0.99, which ends the range at 2.65 sigma on the way back.
    """
    return _levels(bits, torch.device(device))


@functools.cache
def _levels(bits: int, device: torch.device) -> Tensor:
    top = qmax(bits)
    steps = torch.arange(-top, top + 1, dtype=torch.float64) * (math.tanh(SIGMAS) / top)
    return (torch.atanh(steps) / SIGMAS).float().to(device)  # computed once, the same everywhere
