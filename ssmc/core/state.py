"""Recurrent states as plain tensors: what a graph takes in and gives back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

States = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StateSpec:
    """One state: its name (`l3_conv`), its shape without the batch dimension, its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def zeros(self, batch: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """The state of `batch` fresh sequences, [batch, *shape]."""
        return torch.zeros((batch, *self.shape), dtype=self.dtype, device=device)


def fresh_states(
    specs: Iterable[StateSpec], batch: int, device: torch.device | str = "cpu"
) -> States:
    """All states of `batch` fresh sequences."""
    return {spec.name: spec.zeros(batch, device) for spec in specs}
