"""Random operands of kernels, on a device."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmc.quant.formats import bf16_up, pack

GROUP = 128
"""Columns of a weight of 4 bits that share a scale."""


def integers(*shape: int, device: torch.device) -> Tensor:
    """int8 from -127 to 127."""
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)


def scales(*shape: int, device: torch.device, least: float = 0.001, most: float = 0.011) -> Tensor:
    """Scales with 8 significant bits between two values."""
    return bf16_up(torch.rand(shape, device=device) * (most - least) + least)


def weight(n: int, k: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A weight [n, k] of 8 or 4 bits, and its scales."""
    if bits == 8:
        return integers(n, k, device=device), scales(n, 1, device=device)
    q = torch.randint(-8, 8, (n, k), dtype=torch.int8, device=device)
    return pack(q, 4, GROUP), scales(n, k // GROUP, device=device)


def weight_bytes(n: int, k: int, bits: int) -> float:
    """Bytes of such a weight and of its scales."""
    return n * k * bits / 8 + (4 * n if bits == 8 else 4 * n * k / GROUP)
