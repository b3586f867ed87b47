"""The matrices that rotate."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmc.quant.rotation import hadamard_matrix, largest_block


def rotation(width: int, block: int | None = None) -> Tensor:
    """The orthogonal matrix of a block-diagonal rotation, [width, width]; of largest blocks."""
    block = block or largest_block(width)
    return torch.block_diag(*[hadamard_matrix(block) / block**0.5] * (width // block))
