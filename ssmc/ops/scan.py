"""What the two scans share: the step size and the direction."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def step_size(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """softplus(dt + bias); dt [B, L, ...], bias as dt's trailing dimensions or None."""
    dt = dt if bias is None else dt + bias
    return F.softplus(dt) if softplus else dt


def along(reverse: bool, *sequences: Tensor) -> tuple[Tensor, ...]:
    """The sequences [B, L, ...] in scan order: flipped in the length where `reverse`."""
    return tuple(x.flip(1) for x in sequences) if reverse else sequences
