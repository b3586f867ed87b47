"""The cross-check of the tracer: the same program, exported by torch.export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from ssmc.core.exported import export_marked
from ssmc.core.graph import meta_state
from ssmc.core.state import StateSpec
from ssmc.frontend.program import Program, program


def export_program(
    module: nn.Module, example_inputs: Sequence[Tensor] | Tensor | None = None
) -> tuple[ExportedProgram, list[StateSpec]]:
    """`module` under its adapters as torch.export sees it, and the states it takes.

    Takes what `trace` takes. The exported program's inputs are the module's, then the states;
    it gives `(result, new_states)`, for any batch size and any length.
    """
    traced = program(module, example_inputs)
    operands = (*traced.inputs.values(), *(meta_state(spec) for spec in traced.states))
    return export_marked(_Exportable(traced), operands), traced.states


class _Exportable(nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.module = program.module
        self.program = program

    def forward(self, *operands: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
        return self.program(*operands)
