"""Does the lowered model compute what the simulated one does? Operator by operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ssmc.core import States
from ssmc.core.dialect import target_name
from ssmc.core.pipeline import relative_error
from ssmc.core.state import fresh_states
from ssmc.quant.formats import dequantize_tensor
from ssmc.runtime.model import CompiledModel

QUANTIZE = ("ssmc::quantize", "ssmc::quantize_dynamic")


@dataclass(frozen=True)
class Comparison:
    """One call: `differing` integers out of `values`, and the relative error of its floats."""

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
    """Compare every fused and every quantize call of the lowered graph with its simulation.

    Each lowered call gets the simulated operands, so that one that differs is named alone. A model
    with states runs the second half of its inputs [batch, length, ...] from the states of the
    first, so that what kernels do with states is compared too. Where simulation holds a float
    and the lowered graph its integers (convolution states), they are compared as the values
    they stand for.
    """
    found: list[Comparison] = []
    simulated: States | None = None
    lowered = fresh_states(model.lowered.graph.states, len(inputs[0]), inputs[0].device)
    for part in _parts(model, inputs):
        checker = _Checker(model)
        model.graph.watch(checker.remember, *part, states=simulated)
        checker.run(*part, *lowered.values())
        found += checker.found
        _, simulated = model.graph(*part, states=simulated)
        _, lowered = model.lowered.graph(*part, states=lowered)
    return found


def _parts(
    model: CompiledModel, inputs: tuple[torch.Tensor, ...]
) -> list[tuple[torch.Tensor, ...]]:
    lengths = {x.shape[1] if x.dim() > 1 else 0 for x in inputs}
    if not model.graph.states or len(lengths) > 1 or min(lengths) < 2:
        return [inputs]
    half = (min(lengths) + 1) // 2
    return [tuple(x[:, :half] for x in inputs), tuple(x[:, half:] for x in inputs)]


class _Checker(fx.Interpreter):
    """Runs the lowered graph call by call on remembered operands."""

    def __init__(self, model: CompiledModel) -> None:
        super().__init__(model.lowered.graph.module)
        backend = model.lowered.backend
        self.tolerance = backend.tolerance
        self.names = {kernel: name for name, kernel in backend.kernels.items()}
        self.fused = set(model.lowered.fused)
        self.expected: dict[str, Any] = {}
        self.found: list[Comparison] = []

    def remember(self, node: fx.Node, value: Any) -> None:
        """Keep a value of the simulated run."""
        self.expected[node.name] = value

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            value = super().run_node(n)
        if n.op == "output" or n.name not in self.expected:
            return value
        expected = self.expected[n.name]
        if n.name in self.fused or target_name(n.target) in QUANTIZE:
            self._compare(n, _members(value), _members(expected))
        return _like(expected, value)

    def _compare(self, node: fx.Node, value: list[Any], expected: list[Any]) -> None:
        differing, error = 0, 0.0
        for got, wanted in zip(value, expected, strict=True):
            if got.dtype == torch.int8 != wanted.dtype:
                scale = self.fetch_args_kwargs_from_env(node)[0][1]
                differing += int((dequantize_tensor(got, scale) != wanted).sum())
            elif got.is_floating_point():
                error = max(error, relative_error(got, wanted))
            else:
                differing += int((got != wanted).sum())
        name = self.names.get(node.target) or target_name(node.target)  # type: ignore[arg-type]
        values = sum(v.numel() for v in value)
        self.found.append(Comparison(node.name, name, values, differing, error, self.tolerance))


def _members(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]


def _like(expected: Any, value: Any) -> Any:
    """The simulated value, where the lowered graph has it in the same form."""
    if isinstance(value, tuple | list):
        return tuple(_like(e, v) for e, v in zip(expected, value, strict=True))
    same = isinstance(value, torch.Tensor) and value.dtype == expected.dtype
    return expected if same else value
