"""The blocks of a model one after the other, on all calibration windows at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ssmc.core import Graph, is_call
from ssmc.core.ranks import Ranks
from ssmc.core.saved import Saved
from ssmc.core.state import fresh_states
from ssmc.passes.ssm_sites import SCANS

Call = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]
"""How the call of a node is computed, from its arguments and keyword arguments."""
Params = Mapping[str, Tensor]
Values = dict[fx.Node, Any]


def plain(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the node calls."""
    return node.target(*args, **kwargs)  # type: ignore[operator]


@dataclass(frozen=True)
class Block:
    """Calls that follow one another in a layer, and those of their values that others read."""

    calls: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @property
    def scans(self) -> list[fx.Node]:
        """The scans among the calls."""
        return [node for node in self.calls if is_call(node, *SCANS)]

    def run(self, given: Values, params: Params, call: Call = plain) -> Values:
        """The outputs, from the values that the calls read and all parameters."""
        values = dict(given)

        def value(node: fx.Node) -> Any:
            return params[str(node.target)] if node.op == "get_attr" else values[node]

        for node in self.calls:
            values[node] = call(node, *fx.map_arg((node.args, node.kwargs), value))
        return {node: values[node] for node in self.outputs}


def blocks(g: Graph) -> list[Block]:
    """The calls of `g` in runs of one layer, up to the last that holds a scan."""
    calls = [n for n in g.nodes if n.op == "call_function"]
    runs = [tuple(run) for _, run in itertools.groupby(calls, lambda n: n.meta.get("layer"))]
    while runs and not any(is_call(n, *SCANS) for n in runs[-1]):
        runs.pop()
    return [Block(run, tuple(n for n in run if _is_read(n, set(run)))) for run in runs]


def _is_read(node: fx.Node, calls: set[fx.Node]) -> bool:
    return any(user not in calls and user.op != "output" for user in node.users)


class Stream:
    """The values of all windows between two blocks: what blocks to come read, and no more.

    Windows are run `batch` at a time, and `ranks` share these batches; each has all values.
    """

    def __init__(
        self, g: Graph, windows: Sequence[Tensor], batch: int, ranks: Ranks | None = None
    ) -> None:
        placeholders = [n for n in g.nodes if n.op == "placeholder"][: len(windows)]
        self.g, self.batch, self.room = g, batch, g.tokens(windows)
        self.ranks = ranks or Ranks()
        self.values: Values = dict(zip(placeholders, windows, strict=True))

    def given(self, which: Tensor | slice) -> Values:
        """The values of some windows, with fresh states."""
        values = {node: value[which] for node, value in self.values.items()}
        size = len(next(iter(values.values())))
        for name, state in fresh_states(self.g.states, size, self.device, self.room).items():
            values[self.g.node(name)] = state
        return values

    def advance(self, block: Block, params: Params, call: Call = plain) -> None:
        """Run a block on all windows."""

        def run(which: slice) -> Saved:
            with torch.no_grad():
                found = block.run(self.given(which), params, call)
            return Saved({}, {node.name: value for node, value in found.items()})

        parts, device = self.ranks.map(run, list(self._batches())), self.device
        for node in block.outputs:
            value = torch.cat([part.tensors[node.name].to(device) for part in parts])
            self.values[node] = value.contiguous()  # as it comes from others, and from the disk

    def forget(self, later: set[fx.Node]) -> None:
        """Keep only the values that calls in `later` read."""
        self.values = {n: v for n, v in self.values.items() if not later.isdisjoint(n.users)}

    @property
    def windows(self) -> int:
        """How many windows there are."""
        return len(next(iter(self.values.values())))

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return next(iter(self.values.values())).device

    def _batches(self) -> Iterator[slice]:
        for start in range(0, self.windows, self.batch):
            yield slice(start, start + self.batch)
