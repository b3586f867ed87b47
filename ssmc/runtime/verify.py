"""Does the lowered model compute what the simulated one does? Operator by operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ssmc.core.dialect import target_name
from ssmc.core.pipeline import relative_error
from ssmc.core.state import fresh_states
from ssmc.runtime.model import CompiledModel


@dataclass(frozen=True)
class Comparison:
    """One call: `differing` integers out of `values`, or the relative error of its floats."""

    node: str
    operator: str
    values: int
    differing: int
    error: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether no integer differs and the floats differ by at most the tolerance."""
        return self.differing == 0 and self.error <= self.tolerance


def verify(model: CompiledModel, *inputs: torch.Tensor) -> list[Comparison]:
    """Compare every call of the lowered graph with the call of that name in the simulated one.

    Each lowered call gets the simulated operands, so that one that differs is named alone. Where
    simulation holds a float and the lowered graph its integers (convolution states), they are
    compared as the values they stand for.
    """
    checker = _Checker(model)
    model.graph.watch(checker.remember, *inputs)
    checker.run(*inputs, *fresh_states(model.lowered.graph.states, len(inputs[0])).values())
    return checker.found


class _Checker(fx.Interpreter):
    """Runs the lowered graph call by call on remembered operands."""

    def __init__(self, model: CompiledModel) -> None:
        super().__init__(model.lowered.graph.module)
        self.tolerance = model.lowered.backend.tolerance
        self.fused = set(model.lowered.fused)
        self.expected: dict[str, Any] = {}
        self.found: list[Comparison] = []

    def remember(self, node: fx.Node, value: Any) -> None:
        """Keep a value of the simulated run."""
        self.expected[node.name] = value

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "call_function" or n.name not in self.expected:
            return value
        expected = self.expected[n.name]
        if n.name in self.fused:
            first, wanted = (_first(value), _first(expected))
            self.found.append(self._compare(n, first, wanted))
        elif isinstance(value, torch.Tensor) and value.dtype == torch.int8 == expected.dtype:
            self.found.append(self._compare(n, value, expected))
        return _like(expected, value)

    def _compare(self, node: fx.Node, value: torch.Tensor, expected: torch.Tensor) -> Comparison:
        integer = not value.is_floating_point()
        return Comparison(
            node.name,
            target_name(node.target),
            value.numel(),
            int((value != expected).sum()) if integer else 0,
            0.0 if integer else relative_error(value, expected),
            self.tolerance,
        )


def _first(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple | list) else value


def _like(expected: Any, value: Any) -> Any:
    """The simulated value, where the lowered graph has it in the same form."""
    if isinstance(value, tuple | list):
        return tuple(_like(e, v) for e, v in zip(expected, value, strict=True))
    same = isinstance(value, torch.Tensor) and value.dtype == expected.dtype
    return expected if same else value
