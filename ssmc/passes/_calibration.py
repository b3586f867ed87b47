"""Activations on calibration text: their ranges, and the inputs of one layer after the other."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ssmc.core import Context, Graph
from ssmc.core.dialect import operands
from ssmc.core.graph import check_finite
from ssmc.core.state import States, fresh_states
from ssmc.quant.observers import Observer


def observe(g: Graph, observers: Mapping[fx.Node, Observer], context: Context) -> None:
    """Show each observer every value of its node over the calibration batches, [tokens, C].

    Raises NumericsError naming the first node whose value holds NaN or infinity.
    """
    by_name = {node.name: observer for node, observer in observers.items()}

    def seen(node: fx.Node, value: Any) -> None:
        observer = by_name.get(node.name)
        if observer is not None:
            check_finite(node, value)
            observer.observe(value.reshape(-1, math.prod(channels(node))))

    for batch in context.batches():
        g.watch(seen, *batch)


def points(g: Graph) -> dict[fx.Node, str]:
    """Every activation that quantisation may touch, with its name: needs ssm-sites and linears."""
    found: dict[fx.Node, str] = {}
    for site in g.facts["ssm-sites"]:
        found |= {node: name for name, node in site.values().items()}
    for linear in g.facts["linears"]:
        found.setdefault(linear.input, f"{linear.role} input")
    return found


def tokens(context: Context) -> int:
    """How many tokens the calibration batches hold."""
    return sum(batch[0].shape[0] * batch[0].shape[1] for batch in context.calibration)


def channels(node: fx.Node) -> torch.Size:
    """The shape of a value beyond [batch, length], or beyond [batch] where that is all it has."""
    shape = node.meta["val"].shape
    return shape[2:] if len(shape) > 2 else shape[1:]


class StagedRun:
    """The calibration batches on their way through a graph, from one linear layer to the next.

    Every call before the last of `linears` runs once for each batch, with the parameters as they
    are when it is its turn. Of a batch's values those stay that calls to come read: at the input of
    a block that is little more than the residual stream.
    """

    def __init__(self, g: Graph, linears: Sequence[fx.Node], context: Context) -> None:
        self.g, self.linears, self.context = g, linears, context
        order = [n for n in g.nodes if n.op == "call_function" and not _is_constant(n)]
        self.order = order[: max((order.index(n) for n in linears), default=0)]
        self.last_reader = {n: user for user in (*self.order, *linears[-1:]) for n in _read(user)}

    def inputs(self) -> Iterator[tuple[fx.Node, Iterator[Any]]]:
        """Each layer, in execution order, with its input in every batch, to be read to the end.

        Of stacked experts the input comes with the experts chosen, as a pair.
        """
        fresh = functools.cache(functools.partial(fresh_states, self.g.states))
        values = [
            self._start(batch, fresh(len(batch[0]), batch[0].device, self.g.tokens(batch)))
            for batch in self.context.given()
        ]
        done = 0
        for number, linear in enumerate(self.linears):
            self.context.progress(number, len(self.linears))
            at = self.order.index(linear) if linear in self.order else len(self.order)
            yield linear, (self._advance(v, self.order[done:at], linear) for v in values)
            done = at
        self.context.progress(len(self.linears), len(self.linears))

    def _start(self, batch: tuple[Any, ...], states: States) -> dict[fx.Node, Any]:
        placeholders = [n for n in self.g.nodes if n.op == "placeholder"]
        return dict(zip(placeholders, (*batch, *states.values()), strict=True))

    def _advance(
        self, values: dict[fx.Node, Any], calls: Sequence[fx.Node], linear: fx.Node
    ) -> Any:
        for node in calls:
            values[node] = self._value(values, node)
            for operand in (*_read(node), node):
                if self.last_reader.get(operand, node) is node:
                    values.pop(operand, None)
        given = operands(linear)
        read = [self._value(values, given[name]) for name in ("x", "index") if name in given]
        return read[0] if len(read) == 1 else tuple(read)

    def _value(self, values: dict[fx.Node, Any], node: fx.Node) -> Any:
        """A value that is there, a parameter, or the result of a call of such."""
        if node in values:
            return values[node]
        if node.op == "get_attr":
            return self.g.param(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._value(values, n))
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]


def _is_constant(node: fx.Node) -> bool:
    """Whether a value depends on parameters alone."""
    calls = node.op == "call_function" and all(map(_is_constant, node.all_input_nodes))
    return node.op == "get_attr" or calls


def _read(node: fx.Node) -> list[fx.Node]:
    """The values a call reads that depend on the model's inputs."""
    return [n for n in node.all_input_nodes if not _is_constant(n)]
