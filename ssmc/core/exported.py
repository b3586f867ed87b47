"""torch.export of a module whose operands are marked, as meta tensors, with what is dynamic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from ssmc.core.graph import BATCH, LENGTH, ROOM

NAMES = {BATCH: "batch", LENGTH: "length", ROOM: "room"}
"""What the dynamic extents are called."""

_EXAMPLE = {BATCH: 2, LENGTH: 5, ROOM: 7}


def export_marked(module: nn.Module, operands: tuple[Any, ...]) -> ExportedProgram:
    """`module(*operands)` as one program, for any batch, length and room from 1 on.

    `operands` are meta tensors, or lists of them. Those of their first two extents that are BATCH,
    LENGTH or ROOM become dynamic.
    """
    dims = {name: Dim(name, min=1) for name in NAMES.values()}
    dynamic = tree_map(
        lambda x: {i: dims[name] for i, name in dynamic_extents(x).items()}, operands
    )
    with torch.no_grad():
        return torch.export.export(
            module, tree_map(_example, operands), dynamic_shapes=(dynamic,), strict=False
        )


def dynamic_extents(marked: Tensor) -> dict[int, str]:
    """Which extents of a meta tensor are dynamic, and what they are called."""
    return {i: NAMES[extent] for i, extent in enumerate(marked.shape[:2]) if extent in NAMES}


def _example(marked: Tensor) -> Tensor:
    shape = [_EXAMPLE[e] if i in dynamic_extents(marked) else e for i, e in enumerate(marked.shape)]
    return torch.zeros(shape, dtype=marked.dtype)
