"""The cross-check of the tracer: the same program, exported by torch.export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ssmc.core.graph import BATCH, LENGTH, ROOM
from ssmc.core.state import StateSpec, fresh_states
from ssmc.frontend.program import Program, program

_EXAMPLE = {BATCH: 2, LENGTH: 5, ROOM: 7}


def export_program(
    module: nn.Module, example_inputs: Sequence[Tensor] | Tensor | None = None
) -> tuple[ExportedProgram, list[StateSpec]]:
    """`module` under its adapters as torch.export sees it, and the states it takes.

    Takes what `trace` takes. The exported program's inputs are the module's, then the states;
    it gives `(result, new_states)`, for any batch size and any length.
    """
    traced = program(module, example_inputs)
    inputs = [torch.zeros(_example_shape(x), dtype=x.dtype) for x in traced.inputs.values()]
    states = list(fresh_states(traced.states, _EXAMPLE[BATCH], room=_EXAMPLE[ROOM]).values())
    dims = {BATCH: Dim("batch", min=1), LENGTH: Dim("length", min=1)}
    room = Dim("room", min=1)
    dynamic: list[dict[int, Any]] = [
        {i: dims[extent] for i, extent in enumerate(x.shape[:2]) if extent in dims}
        for x in traced.inputs.values()
    ]
    dynamic += [{0: dims[BATCH], **({1: room} if s.is_open else {})} for s in traced.states]
    with torch.no_grad():
        exported = torch.export.export(
            _Exportable(traced), (*inputs, *states), dynamic_shapes=(tuple(dynamic),), strict=False
        )
    return exported, traced.states


def _example_shape(marked: Tensor) -> list[int]:
    return [_EXAMPLE.get(extent, extent) for extent in marked.shape]


class _Exportable(nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.module = program.module
        self.program = program

    def forward(self, *operands: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
        return self.program(*operands)
