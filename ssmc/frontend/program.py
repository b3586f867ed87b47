"""What is traced: a module under its adapters, as a function of inputs and states."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ssmc.core.graph import BATCH, LENGTH, length_of
from ssmc.core.state import POSITION, StateSpec
from ssmc.errors import UnsupportedError, UsageError
from ssmc.frontend import huggingface
from ssmc.frontend.adapters import Site, adapter_of, installed
from ssmc.frontend.support import check_supported


class Program:
    """A module as a function: `program(*inputs, *states)` gives `(result, new_states)`.

    `inputs` are meta tensors by name; extents of `BATCH` and `LENGTH` stand for dynamic ones.
    `states` are the specs of the states, in order. The module runs in evaluation mode, by its
    adapters, and is as it was after each call.
    """

    def __init__(
        self, module: nn.Module, inputs: dict[str, Tensor], run: Callable[..., Any]
    ) -> None:
        self.module = module
        self.inputs = inputs
        self.run = run
        self.sites = sites(module)
        self.states = list(dict.fromkeys(spec for site in self.sites for spec in _specs(site)))
        _check_caches(self.states)

    def __call__(self, *operands: Any) -> tuple[Any, tuple[Any, ...]]:
        """The result and the new states, from the inputs followed by the states."""
        inputs, rest = operands[: len(self.inputs)], operands[len(self.inputs) :]
        states = dict(zip((spec.name for spec in self.states), rest, strict=True))
        with _evaluating(self.module), installed(self.sites, states) as new:
            result = self.run(self.module, *inputs)
        if POSITION in states:
            new[POSITION] = states[POSITION] + self._tokens(inputs)
        return result, tuple(new.get(name, state) for name, state in states.items())

    def _tokens(self, inputs: tuple[Any, ...]) -> Any:
        """How many tokens a sequence has in a call."""
        length = length_of(inputs, self.inputs.values())
        if length is None:
            raise UnsupportedError(
                "a module with attention has no input [batch, length, ...]",
                hint="its caches hold a row for each token",
            )
        return length


def program(module: nn.Module, example_inputs: Sequence[Tensor] | Tensor | None) -> Program:
    """A causal language model's program from token ids, or anyone's module from its inputs.

    Raises UsageError where a module that is no causal language model comes without inputs, and
    UnsupportedError for a language model with layers that no adapter knows.
    """
    if huggingface.is_causal_lm(module):
        check_supported(module)
        ids = torch.empty(BATCH, LENGTH, dtype=torch.int64, device="meta")
        return Program(module, {"input_ids": ids}, huggingface.logits)
    if example_inputs is None:
        raise UsageError(
            f"{type(module).__name__} is not a Hugging Face causal language model",
            hint="give example_inputs, a tuple of tensors its forward takes",
        )
    examples = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    return Program(module, _marked(module, examples), _call)


def sites(module: nn.Module) -> list[Site]:
    """Every sub-module that an adapter traces, with the names of its states."""
    found = [
        (path, child, adapter)
        for path, child in module.named_modules()
        if (adapter := adapter_of(child)) is not None
    ]
    stateful = [path for path, _, adapter in found if adapter.states is not None]
    numbers = _numbers(module, stateful)
    return [
        Site(path, child, adapter, _state_names(child, adapter, numbers.get(path)))
        for path, child, adapter in found
    ]


def layer_of(module: nn.Module, path: str) -> int | None:
    """The layer of a module path: the first index into a ModuleList on the way."""
    for part in path.split(".") if path else ():
        if isinstance(module, nn.ModuleList):
            return int(part)
        module = getattr(module, part)
    return None


def _numbers(module: nn.Module, paths: list[str]) -> dict[str, int]:
    """The number in each stateful module's state names: its layer where that is unambiguous."""
    of_layer = [layer_of(module, path) for path in paths]
    distinct = None not in of_layer and len(set(of_layer)) == len(paths)
    return {
        path: number if distinct and number is not None else index
        for index, (path, number) in enumerate(zip(paths, of_layer, strict=True))
    }


def _state_names(module: nn.Module, adapter: Any, number: int | None) -> dict[str, str]:
    kinds = () if adapter.states is None else adapter.states(module)
    return {kind: kind if kind == POSITION else f"l{number}_{kind}" for kind in kinds}


def _specs(site: Site) -> list[StateSpec]:
    shapes = site.adapter.states(site.module) if site.adapter.states else {}
    return [
        StateSpec(
            site.states[kind], tuple(shape), torch.int64 if kind == POSITION else torch.float32
        )
        for kind, shape in shapes.items()
    ]


def _check_caches(states: Sequence[StateSpec]) -> None:
    """Raise UsageError for caches whose adapter does not name the position."""
    cache = next((spec.name for spec in states if spec.is_open), None)
    if cache is not None and POSITION not in {spec.name for spec in states}:
        raise UsageError(
            f"state '{cache}' has a row for each token, and no adapter names '{POSITION}'",
            hint=f"add '{POSITION}': () to the states of its adapter",
        )


def _marked(module: nn.Module, examples: Sequence[Tensor]) -> dict[str, Tensor]:
    """Meta tensors like the examples, dynamic in dimension 0 and, where it is the length, 1.

    The length is dimension 1 of the first example that has one; an input that differs from it
    there is static.
    """
    if not examples or not all(isinstance(x, Tensor) and x.ndim for x in examples):
        raise UsageError(
            "example_inputs must be tensors whose dimension 0 is the batch",
            hint="for instance ssmc.trace(module, (torch.zeros(2, 5, 64),))",
        )
    length = next((x.shape[1] for x in examples if x.ndim > 1), None)
    marked = []
    for x in examples:
        dynamic = [BATCH, LENGTH] if x.ndim > 1 and x.shape[1] == length else [BATCH]
        dtype = torch.float32 if x.is_floating_point() else x.dtype
        shape = (*dynamic, *x.shape[len(dynamic) :])
        marked.append(torch.empty(shape, dtype=dtype, device="meta"))
    return dict(zip(_argument_names(module, len(examples)), marked, strict=True))


def _argument_names(module: nn.Module, count: int) -> list[str]:
    try:
        bound = inspect.signature(module.forward).bind(*range(count))
    except TypeError as error:
        raise UsageError(
            f"{type(module).__name__}.forward does not take {count} inputs: {error}",
            hint="example_inputs has one tensor for each argument",
        ) from None
    names = [
        [name] if not isinstance(value, tuple) else [f"{name}_{i}" for i in range(len(value))]
        for name, value in bound.arguments.items()
    ]
    return [name for group in names for name in group]


def _call(module: nn.Module, *inputs: Any) -> Any:
    result = module(*inputs)
    if isinstance(result, list | tuple) and all(isinstance(x, Tensor | fx.Proxy) for x in result):
        return tuple(result)
    if not isinstance(result, Tensor | fx.Proxy):
        raise UnsupportedError(
            f"{type(module).__name__} returns {type(result).__name__}",
            hint="return a tensor or a tuple of tensors",
        )
    return result


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode within the context, each sub-module's own mode after it."""
    training = [child for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True
