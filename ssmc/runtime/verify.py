"""Does the lowered model compute what the simulated one does? Operator by operator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from ssmc.core import Graph, States
from ssmc.core.dialect import operands, target_name
from ssmc.core.graph import is_call
from ssmc.core.pipeline import relative_error
from ssmc.core.state import fresh_states
from ssmc.device import running_on
from ssmc.lowering import Form, Lowered, Tolerance
from ssmc.lowering.rewriter import VIEWS, call_behind
from ssmc.quant.formats import quantize_tensor
from ssmc.runtime.model import CompiledModel

QUANTIZE = ("ssmc::quantize", "ssmc::quantize_dynamic", "ssmc::quantize_state")


@dataclass(frozen=True)
class Comparison:
    """One value: `differing` integers out of `values`, and the relative error of its floats.

    `largest` is the largest difference of two integers; `error` and `differing` are held against
    `tolerance` and the share `flips`.
    """

    node: str
    operator: str
    form: Form
    values: int
    differing: int
    largest: int
    error: float
    tolerance: float
    flips: float

    @property
    def agrees(self) -> bool:
        """Whether the floats are within the tolerance, and the integers equal.

        Of integers, a share of `flips` may be off by one.
        """
        allowed = self.flips * self.values
        integers = self.differing == 0 or (self.largest <= 1 and self.differing <= allowed)
        return integers and self.error <= self.tolerance


def verify(model: CompiledModel, *inputs: Tensor) -> list[Comparison]:
    """Compare every value that the lowered graphs, or kernels, compute anew with its simulation.

    Each lowered call gets the simulated operands, so that one that differs is named alone. Of
    inputs [batch, length, ...] a model with states runs the first half from fresh states, the
    second from those of the first, and the last position by itself in the form for steps, so that
    what kernels do with states is compared too. States in int8 are compared as integers.
    """
    found: list[Comparison] = []
    with running_on(model.device):
        inputs = tuple(x.to(model.device) for x in inputs)
        room = model.graph.tokens(inputs)
        states = fresh_states(model.graph.states, len(inputs[0]), model.device, room)
        for form, part in _parts(model, inputs):
            checker = _Checker(model.graph, model.form(form))
            model.graph.watch(checker.remember, *part, states=states)
            found += checker.compare(part, states)
            new = (checker.expected[node.name] for node in model.graph.new_states)
            states = dict(zip(states, new, strict=True))
    return found


def _parts(
    model: CompiledModel, inputs: tuple[Tensor, ...]
) -> Iterator[tuple[Form, tuple[Tensor, ...]]]:
    lengths = {x.shape[1] if x.dim() > 1 else 0 for x in inputs}
    if not model.graph.states or len(lengths) > 1 or min(lengths) < 2:
        yield "sequence", inputs
        return
    length = min(lengths)
    cuts = sorted({0, length // 2, length - 1, length})
    for start, stop in pairwise(cuts):
        part = tuple(x[:, start:stop] for x in inputs)
        yield ("step" if stop == length else "sequence"), part


class _Checker(fx.Interpreter):
    """Runs a lowered graph call by call on remembered operands."""

    def __init__(self, simulated: Graph, lowered: Lowered) -> None:
        super().__init__(lowered.graph.module)
        self.lowered, self.form = lowered, lowered.form
        self.scales = _state_scales(simulated)
        self.names = {kernel: name for name, kernel in lowered.backend.load().items()}
        self.fused = set(lowered.fused)
        self.expected: dict[str, Any] = {}
        self.found: list[Comparison] = []

    def remember(self, node: fx.Node, value: Any) -> None:
        """Keep a value of the simulated run."""
        self.expected[node.name] = value

    def compare(self, inputs: tuple[Tensor, ...], states: States) -> list[Comparison]:
        """Run on `inputs` and simulated `states`."""
        specs = self.lowered.graph.states
        given = (_as_integers(states[s.name], self.scales.get(s.name), s.dtype) for s in specs)
        self.run(*inputs, *(state.clone() for state in given))  # a step overwrites them
        return self.found

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            value = super().run_node(n)
        if n.op != "call_function" or n.name not in self.expected:
            return value
        pairs = list(self._pairs(n, value))
        if self._is_new(n):
            self._compare(n, pairs)
        alike = [wanted if _alike(got, wanted) else got for got, wanted in pairs]
        return tuple(alike) if isinstance(value, tuple | list) else alike[0]

    def _is_new(self, n: fx.Node) -> bool:
        """Whether `n` is what lowering computes anew, or a kernel computes in its own way.

        Of a result, not also what is taken of it.
        """
        if n.name in self.fused or n.target in self.names or self._operator(n) in QUANTIZE:
            return True
        call = n
        while is_call(call, *VIEWS):
            call = call.args[0]  # type: ignore[assignment]
            if call.name in self.expected:
                return False
        return call.name in self.fused

    def _pairs(self, node: fx.Node, value: Any) -> Iterator[tuple[Any, Any]]:
        """A value, or the members of a tuple, each with what is expected, in its own type."""
        for got, wanted in zip(_members(value), _members(self.expected[node.name]), strict=True):
            scale = self.scales.get(node.name)
            yield got, _as_integers(wanted, scale, got.dtype) if _is_tensor(got) else wanted

    def _operator(self, node: fx.Node) -> str:
        return self.names.get(node.target) or target_name(node.target)  # type: ignore[arg-type]

    def _compare(self, node: fx.Node, pairs: list[tuple[Tensor, Tensor]]) -> None:
        differing, largest, error = 0, 0, 0.0
        for got, wanted in pairs:
            if got.is_floating_point():
                error = max(error, relative_error(got, wanted))
            else:
                distance = (got.long() - wanted.long()).abs()
                differing += int(distance.count_nonzero())
                largest = max(largest, int(distance.max()))
        call = call_behind(node)
        operator = self._operator(call)
        int4 = any(_is_packed(operand.meta["val"]) for operand in call.all_input_nodes)
        allowed: Tolerance = self.lowered.backend.tolerance(operator, int4)
        values = sum(got.numel() for got, _ in pairs)
        measured = (values, differing, largest, error)
        self.found.append(
            Comparison(node.name, operator, self.form, *measured, allowed.error, allowed.flips)
        )


def _state_scales(g: Graph) -> dict[str, Tensor]:
    """The scales of convolution states, by the names of the values that are or hold one.

    Simulated they are floats, lowered integers with the scale of the convolution's input.
    """
    scales: dict[str, Tensor] = {}
    for conv in g.calls("ssmc::causal_conv1d"):
        x, state = operands(conv)["x"], operands(conv)["state"]
        if is_call(x, "ssmc::dequantize") and operands(x)["scale"].op == "get_attr":
            held_by = [conv, *conv.users, *([state] if state is not None else [])]
            scales |= dict.fromkeys((n.name for n in held_by), g.param(operands(x)["scale"]))
    return scales


def _as_integers(value: Any, scale: Tensor | None, dtype: torch.dtype) -> Any:
    """A state as integers where it is held in those: exact, since it is integers times `scale`."""
    integers = dtype == torch.int8 and scale is not None and value.is_floating_point()
    return quantize_tensor(value, scale) if integers and scale is not None else value


def _members(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]


def _is_packed(value: Any) -> bool:
    return _is_tensor(value) and value.dtype == torch.uint8


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _alike(got: Any, wanted: Any) -> bool:
    """Whether the simulation has the value in the same form, so that it may go on from it."""
    if not _is_tensor(got) or not _is_tensor(wanted):
        return False
    return got.dtype == wanted.dtype and got.shape == wanted.shape
