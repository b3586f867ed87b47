"""Fitting a block that is run in one way to what it gives in another, by gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ssmc.core.ranks import Ranks
from ssmc.core.saved import Saved
from ssmc.passes._blocks import Block, Call, Params, Stream


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: see the options of `reconstruct`."""

    steps: int
    lr: float
    batch: int
    patience: int

    @property
    def looks(self) -> int:
        """Steps between two looks at the windows held back."""
        return max(1, self.steps // 8)


@dataclass(frozen=True)
class Fit:
    """A block, its inputs in `student`, and what it is to give in `teacher`.

    `call(number)` says how calls are computed in step `number`. `masks` are of the parameters that
    are trained, by name: 0 where an element stays. The last quarter of the windows is held back.
    `ranks` share the windows of each step, whose gradients are added in order, and those held back.
    """

    block: Block
    params: Params
    masks: Params
    student: Stream
    teacher: Stream
    call: Callable[[int], Call]
    ranks: Ranks = field(default_factory=Ranks)

    def run(
        self, schedule: Schedule, draw: torch.Generator, progress: Callable[[int], None]
    ) -> tuple[dict[str, Tensor], float, float]:
        """The best parameters, and the error on the windows held back before and after."""
        leaves = {name: self.params[name].clone().requires_grad_() for name in self.masks}
        adam = torch.optim.Adam(leaves.values(), lr=schedule.lr)
        best, before = _copy(leaves), self._held_back(leaves, schedule.batch)
        least, worse = before, 0
        for step in range(1, schedule.steps + 1):
            adam.param_groups[0]["lr"] = schedule.lr * (1 - (step - 1) / schedule.steps)
            which = torch.randint(self._trained(), (schedule.batch,), generator=draw)
            self._step(adam, leaves, which, step)
            progress(step)
            if step % schedule.looks:
                continue
            error = self._held_back(leaves, schedule.batch)
            worse = 0 if error < least else worse + 1
            if worse == 0:
                best, least = _copy(leaves), error
            if worse == schedule.patience:
                break
        return best, before, least

    def _step(
        self, adam: torch.optim.Optimizer, leaves: dict[str, Tensor], which: Tensor, number: int
    ) -> None:
        found = self.ranks.map(lambda one: self._gradients(leaves, one, number), which.split(1))
        for name, leaf in leaves.items():
            parts = [part.tensors[name].to(leaf.device) for part in found]
            mean = functools.reduce(torch.add, parts) / len(which)
            leaf.grad = torch.zeros_like(leaf).masked_scatter_(self.masks[name] > 0, mean)
        adam.step()

    def _gradients(self, leaves: dict[str, Tensor], which: Tensor, number: int) -> Saved:
        """The gradients of some windows' error, of what is trained, in one dimension."""
        with torch.enable_grad():
            error = self._error(leaves, which, number)
        grads = torch.autograd.grad(error, list(leaves.values()), materialize_grads=True)
        found = zip(leaves, grads, strict=True)
        return Saved({}, {name: grad[self.masks[name] > 0] for name, grad in found})

    def _error(self, leaves: Params, which: Tensor | slice, number: int) -> Tensor:
        """The mean squared error of the outputs, each relative to its mean square."""
        given = self.student.given(which)
        found = self.block.run(given, {**self.params, **leaves}, self.call(number))
        errors = [
            (value - self.teacher.values[node][which]).square().mean() / self._sizes[node]
            for node, value in found.items()
        ]
        return torch.stack(errors).sum()

    @functools.cached_property
    def _sizes(self) -> dict[fx.Node, Tensor]:
        """The mean squares of the outputs in all windows."""
        return {node: self.teacher.values[node].square().mean() for node in self.block.outputs}

    def _held_back(self, leaves: Params, batch: int) -> float:
        def look(part: slice) -> Saved:
            with torch.no_grad():
                return Saved({"error": self._error(leaves, part, 0).item()})

        found = self.ranks.map(look, list(self._parts(batch)))
        return sum(part.about["error"] for part in found) / len(found)

    def _parts(self, batch: int) -> Iterator[slice]:
        for start in range(self._trained(), self.student.windows, batch):
            yield slice(start, start + batch)

    def _trained(self) -> int:
        return self.student.windows - max(1, self.student.windows // 4)


def _copy(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.detach().clone() for name, leaf in leaves.items()}
