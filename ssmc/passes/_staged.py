"""Calibration batches on their way through a graph, all of them from one stage to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ssmc.core import Context, Graph
from ssmc.core.dialect import operands, target_name
from ssmc.core.graph import fetch
from ssmc.core.saved import Saved
from ssmc.core.state import StateSpec

Values = dict[fx.Node, Any]
Seen = Callable[[fx.Node, Any], None]


@dataclass(frozen=True)
class _Fresh:
    """The state of so many fresh sequences, to be made when it is read."""

    spec: StateSpec
    batch: int
    room: int


class StagedRun:
    """This process's calibration batches in a graph, stopping in front of each of `stops` in turn.

    Every call before the last of them runs once for each batch, with the parameters as they are
    when it is its turn, and `seen` is shown its value. Parameters are read once for all batches,
    and of a batch's values those stay that calls to come read: at the input of a block that is
    little more than the residual stream. They wait on the host, so that the memory of a GPU need
    hold those of one batch only, however many there are.
    """

    def __init__(
        self,
        g: Graph,
        stops: Sequence[fx.Node],
        context: Context,
        seen: Seen = lambda node, value: None,
    ) -> None:
        self.g, self.stops, self.context, self.seen = g, stops, context, seen
        order = [n for n in g.nodes if n.op in ("call_function", "output") and not is_constant(n)]
        self.order = order[: max((order.index(n) for n in stops), default=0)]
        self.last_reader = {n: user for user in (*self.order, *stops[-1:]) for n in _read(user)}
        self.done = 0
        self.values: list[Values] | None = None
        self.fetched: dict[Any, Tensor] = {}  # parameters and fresh states that one stage has read

    def stages(self) -> Iterator[tuple[fx.Node, Iterator[Values]]]:
        """Each stop, with the values in front of it in every batch, to be read to the end."""
        if self.values is None:
            self.values = self._fresh()
        for number in range(self.done, len(self.stops)):
            self.context.progress(number, len(self.stops))
            stop = self.stops[number]
            calls = self.order[self._place(number - 1) : self._place(number)]
            self.done = number + 1
            self.fetched.clear()
            yield stop, self._batches(self.values, calls)
        self.context.progress(len(self.stops), len(self.stops))

    def inputs(self) -> Iterator[tuple[fx.Node, Iterator[Any]]]:
        """Each stop, a linear layer, with its input in every batch, to be read to the end.

        Of stacked experts the input comes with the experts chosen, as a pair.
        """
        for linear, batches in self.stages():
            given = operands(linear)
            names = [given[name] for name in ("x", "index") if name in given]
            read = ([self._value(values, node) for node in names] for values in batches)
            yield linear, (one[0] if len(one) == 1 else tuple(one) for one in read)

    # -- where it stands ----------------------------------------------------------------------

    def save(self, prefix: str = "") -> Saved:
        """How far it is, between two stages, and the values there."""
        if self.context.device.type == "cuda":
            torch.cuda.synchronize(self.context.device)  # the last are on their way to the host
        tensors: dict[str, Tensor] = {}
        batches = [
            {
                n.name: _encode(v, f"{prefix}{i}.{n.name}", tensors)
                for n, v in values.items()
                if n.op != "placeholder"
            }
            for i, values in enumerate(self.values or ())
        ]
        return Saved({f"{prefix}done": self.done, f"{prefix}values": batches}, tensors)

    def restore(self, saved: Saved | None, prefix: str = "") -> None:
        """Go on from there; from the beginning, where it had not begun."""
        if saved is None or not saved.about[f"{prefix}values"]:
            return
        self.done, self.values = saved.about[f"{prefix}done"], self._fresh()
        for values, found in zip(self.values, saved.about[f"{prefix}values"], strict=True):
            there = _decode(found, saved.tensors)
            values |= {self.g.node(name): self._kept(value) for name, value in there.items()}

    # -- running ------------------------------------------------------------------------------

    def _place(self, number: int) -> int:
        """How many calls come before a stop."""
        if number < 0:
            return 0
        stop = self.stops[number]
        return self.order.index(stop) if stop in self.order else len(self.order)

    def _fresh(self) -> list[Values]:
        return [self._start(batch) for batch in self.context.own()]

    def _start(self, batch: tuple[Any, ...]) -> Values:
        placeholders = [n for n in self.g.nodes if n.op == "placeholder"]
        room = self.g.tokens(batch)
        states = [_Fresh(spec, len(batch[0]), room) for spec in self.g.states]
        values = dict(zip(placeholders, (*batch, *states), strict=True))
        for node, value in list(values.items())[: len(batch)]:
            self.seen(node, value)
        return {node: value for node, value in values.items() if node in self.last_reader}

    def _batches(self, all_values: list[Values], calls: Sequence[fx.Node]) -> Iterator[Values]:
        """The values of each batch behind `calls`, which are kept when the next is asked for."""
        for number, kept in enumerate(all_values):
            values = dict(kept)
            self._advance(values, calls)
            yield values
            all_values[number] = {
                node: kept[node] if node in kept else self._kept(value)
                for node, value in values.items()
            }

    def _advance(self, values: Values, calls: Sequence[fx.Node]) -> None:
        for node in calls:
            values[node] = self._value(values, node)
            self.seen(node, values[node])
            for operand in (*_read(node), node):
                if self.last_reader.get(operand, node) is node:
                    values.pop(operand, None)

    def _kept(self, value: Any) -> Any:
        """A value until the next stage, on the host or in a file there, lying as it does now."""

        def keep(part: Any) -> Any:
            if not isinstance(part, Tensor):
                return part
            if self.g.store is None:
                return part.to("cpu", non_blocking=True)  # into pages that a GPU can write
            order, plain = dense(part)
            return undense(order, self.g.keep(plain))

        return fx.node.map_aggregate(value, keep)

    def _there(self, node: fx.Node, value: Any) -> Any:
        """A value where the batches are, from where it was kept."""
        device = self.context.device
        if not isinstance(value, _Fresh):
            return fx.node.map_aggregate(
                value, lambda v: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v
            )
        key = node, value
        if key not in self.fetched:
            self.fetched[key] = value.spec.zeros(value.batch, device, value.room)
        self.seen(node, self.fetched[key])
        return self.fetched[key]

    def _value(self, values: Values, node: fx.Node) -> Any:
        """A value that is there, a parameter, or the result of a call of such."""
        if node in values:
            values[node] = self._there(node, values[node])
            return values[node]
        if node.op == "get_attr":
            return self._param(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._value(values, n))
        call: Any = self.context.kernels.get(target_name(node.target), node.target)
        with torch.no_grad():
            return call(*args, **kwargs)

    def _param(self, node: fx.Node) -> Tensor:
        """A parameter where the batches are: fetched once for all of them, if it is elsewhere."""
        value, device = self.g.param(node), self.context.device
        if value.device == device:
            return value
        if node not in self.fetched:
            self.fetched[node] = fetch(value, device)
        return self.fetched[node]


def is_constant(node: fx.Node) -> bool:
    """Whether a value depends on parameters alone."""
    calls = node.op == "call_function" and all(map(is_constant, node.all_input_nodes))
    return node.op == "get_attr" or calls


def _read(node: fx.Node) -> list[fx.Node]:
    """The values a call reads that depend on the model's inputs."""
    return [n for n in node.all_input_nodes if not is_constant(n)]


def dense(value: Tensor) -> tuple[list[int], Tensor]:
    """An order of dimensions, and `value` permuted to it, contiguous.

    With `undense`, nothing is lost of how it lies in memory, on which the last bits of what is
    computed from it may depend.
    """
    strides = value.stride()
    order = sorted(range(value.dim()), key=lambda dim: -strides[dim])
    return order, value.permute(order).contiguous()


def undense(order: Sequence[int], value: Tensor) -> Tensor:
    """The inverse of `dense`."""
    return value.permute([list(order).index(dim) for dim in range(len(order))])


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON data, its tensors by name."""
    if isinstance(value, Tensor):
        order, tensors[name] = dense(value)
        return {"order": order, "tensor": name}
    if isinstance(value, tuple | list):
        return [_encode(part, f"{name}.{i}", tensors) for i, part in enumerate(value)]
    return value


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return tuple(_decode(part, tensors) for part in value)
    if not isinstance(value, dict):
        return value
    if "order" in value:
        return undense(value["order"], tensors[value["tensor"]])
    return {name: _decode(part, tensors) for name, part in value.items()}
