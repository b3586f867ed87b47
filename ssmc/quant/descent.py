"""Coordinate descent on a rounded weight: what GPTQ leaves is improved value by value.

Behdin, Acharya, Gupta, Song, Zhu, Keerthi and Mazumder 2023, 'QuantEase', arXiv 2309.01885.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmc.quant.gptq import BLOCK, Hessian
from ssmc.quant.weights import WeightFormat


def descend(
    weight: Tensor,
    q: Tensor,
    scale: Tensor,
    hessian: Hessian,
    form: WeightFormat,
    damping: float = 0.01,
    sweeps: int = 1,
) -> tuple[Tensor, Tensor]:
    """Integers int8 [N, K] and scales [N, G] that err no more than q and scale do.

    The error is tr(D H D') of the difference D from weight [N, K], with the damped Hessian H. In a
    sweep each column in turn takes the integers that are best while all others stay, and before
    that, which is ours, the scales of each group take the value that is best for its integers.
    """
    q, scale = q.clone(), scale.clone()
    matrix = hessian.damped(damping).float()
    size = form.group or BLOCK
    for _ in range(sweeps):
        gradient = (weight - form.values(q, scale)) @ matrix  # of the error, times -1/2
        for start in range(0, weight.shape[1], size):
            part = slice(start, min(start + size, weight.shape[1]))
            s = scale[:, start // size if form.group else 0].unsqueeze(1)
            before = form.values(q[:, part], s)
            if form.group:
                _fit_scale(s, form.values(q[:, part], torch.ones_like(s)), gradient, matrix, part)
            fitted = form.values(q[:, part], s)
            gradient -= (fitted - before) @ matrix[part]
            _round_columns(q, s, gradient, matrix, part, form)
            gradient[:, part.stop :] -= (form.values(q[:, part], s) - fitted) @ matrix[
                part, part.stop :
            ]
    return q, scale


def _fit_scale(s: Tensor, levels: Tensor, gradient: Tensor, matrix: Tensor, part: slice) -> None:
    """Give the scales s [N, 1] of levels [N, n], in place, the bfloat16 values of least error."""
    curvature = ((levels @ matrix[part, part]) * levels).sum(1, keepdim=True)
    slope = (levels * gradient[:, part]).sum(1, keepdim=True)
    best = (s + slope / curvature).bfloat16().float()
    s.copy_(torch.where((curvature > 0) & (best * s > 0), best, s))


def _round_columns(
    q: Tensor, s: Tensor, gradient: Tensor, matrix: Tensor, part: slice, form: WeightFormat
) -> None:
    """Let the columns of q in `part` take their best integers one by one, in place."""
    left = gradient[:, part].clone()
    for j in range(part.start, part.stop):
        value = form.values(q[:, j : j + 1], s)
        best = value + left[:, j - part.start, None] / matrix[j, j]
        q[:, j : j + 1] = form.round(best, s)
        left -= (form.values(q[:, j : j + 1], s) - value) * matrix[j, part]
