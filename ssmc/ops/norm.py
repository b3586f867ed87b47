"""Layer normalisation, and that by the root mean square, plain and gated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmc.errors import UsageError
from ssmc.ops.registry import expect_shape, operator


def _normalise(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _norm_fake(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    expect_shape("rms_norm", "weight", weight, x.shape[-1:])
    return x.new_empty(x.shape)


@operator(_norm_fake)
def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension; x [..., D], weight [D].

    Zhang and Sennrich, 'Root Mean Square Layer Normalization', eq. 4.
    """
    expect_shape("rms_norm", "weight", weight, x.shape[-1:])
    y = _normalise(x, eps)
    return y if weight is None else y * weight


def _layer_norm_fake(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    expect_shape("layer_norm", "weight", weight, x.shape[-1:])
    expect_shape("layer_norm", "bias", bias, x.shape[-1:])
    return x.new_empty(x.shape)


@operator(_layer_norm_fake)
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Return (x - mean(x)) / sqrt(var(x) + eps) * weight + bias; x [..., D], weight, bias [D].

    Ba et al., 'Layer Normalization', eq. 4.
    """
    expect_shape("layer_norm", "weight", weight, x.shape[-1:])
    expect_shape("layer_norm", "bias", bias, x.shape[-1:])
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _check_gated(x: Tensor, gate: Tensor | None, weight: Tensor, group_size: int | None) -> None:
    expect_shape("rms_norm_gated", "gate", gate, x.shape)
    expect_shape("rms_norm_gated", "weight", weight, x.shape[-1:])
    if group_size is not None and x.shape[-1] % group_size:
        raise UsageError(
            f"ssmc::rms_norm_gated: group_size {group_size} does not divide the width {x.shape[-1]}"
        )


def _gated_fake(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    _check_gated(x, gate, weight, group_size)
    return x.new_empty(x.shape)


@operator(_gated_fake)
def rms_norm_gated(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """The output norm of Mamba-2: norm(x * silu(gate)) * weight; x and gate [..., D].

    The mean square is taken over groups of `group_size` channels (all of them when None). With
    `norm_before_gate` the gate multiplies the normalised, weighted value instead.
    """
    _check_gated(x, gate, weight, group_size)
    if gate is not None and not norm_before_gate:
        x = x * F.silu(gate)
    groups = x.unflatten(-1, (-1, group_size or x.shape[-1]))
    y = _normalise(groups, eps).flatten(-2) * weight
    return y * F.silu(gate) if gate is not None and norm_before_gate else y
