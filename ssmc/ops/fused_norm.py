"""Norms and rotations that end in int8, a scale a token: one read of a row does it all."""

from __future__ import annotations

from torch import Tensor

from ssmc.ops.hadamard import hadamard
from ssmc.ops.norm import rms_norm, rms_norm_gated
from ssmc.ops.quantize import dequantize, quantize_dynamic
from ssmc.ops.registry import composite


@composite
def rms_norm_quantize(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """`quantize_dynamic` of `rms_norm`: x [..., D] to (q int8 [..., D], scale [..., 1])."""
    return quantize_dynamic(rms_norm(x, weight, eps))


@composite
def add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """`rms_norm_quantize` of the sum: (residual + x [..., D], q int8 [..., D], scale [..., 1])."""
    total = residual + x
    return total, *rms_norm_quantize(total, weight, eps)


@composite
def hadamard_quantize(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """`quantize_dynamic` of `hadamard`: x [..., D] to (q int8 [..., D], scale [..., 1])."""
    return quantize_dynamic(hadamard(x, block))


@composite
def gated_norm_quantize(
    x: Tensor,
    gate_q: Tensor,
    gate_scale: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    block: int = 1,
) -> tuple[Tensor, Tensor]:
    """`rms_norm_gated` by an int8 gate, rotated by `hadamard` where block > 1, and quantised.

    x [..., D], gate_q [..., D] int8 with gate_scale [] or [D]; (q int8 [..., D], scale [..., 1]).
    """
    gate = dequantize(gate_q, gate_scale)
    y = rms_norm_gated(x, gate, weight, eps, group_size, norm_before_gate)
    return quantize_dynamic(y if block == 1 else hadamard(y, block))
