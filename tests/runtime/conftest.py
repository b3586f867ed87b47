"""A module of one's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


class TwoInputs(nn.Module):
    """Two inputs whose names are not in alphabetical order, and a weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12, bias=False)
        self.again = nn.Linear(12, 20, bias=False)
        self.again.weight = self.up.weight

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = torch.nn.functional.silu(self.up(x)) - self.again(mask)
        return self.down(hidden) - mask


@pytest.fixture
def own_module() -> nn.Module:
    return TwoInputs().eval()
