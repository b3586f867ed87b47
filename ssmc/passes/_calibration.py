"""Activations on calibration text, and their ranges."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ssmc.core import Context, Graph
from ssmc.core.ranks import Ranks
from ssmc.core.saved import Saved
from ssmc.errors import NumericsError
from ssmc.passes._staged import StagedRun, is_constant
from ssmc.quant.observers import Observer


def observe(g: Graph, observers: Mapping[fx.Node, Observer], context: Context) -> None:
    """Show each observer every value of its node over the calibration batches, [tokens, C].

    What they keep is in the end where the parameters are. Raises NumericsError naming the first
    node whose value holds NaN or infinity.
    """

    def seen(node: fx.Node, value: Any) -> None:
        observer = observers.get(node)
        if observer is not None:
            observer.observe(value.reshape(-1, math.prod(channels(node))))

    run = StagedRun(g, _stops(g, observers), context, seen)
    saved = context.log.restore(g)
    run.restore(saved)
    if saved is not None:
        for node, observer in observers.items():
            _restore(observer, saved, node.name)
            observer.to(context.device)
    unchecked = {node: observers[node] for node in g.nodes if node in observers}
    for _, batches in run.stages():
        for _values in batches:
            pass
        _check(unchecked)
        if context.log.due():
            context.log.save(g, _position(run, observers))
    _merge(observers, context.ranks)
    for observer in observers.values():
        observer.to(g.device or context.device)


def _check(observers: dict[fx.Node, Observer]) -> None:
    """Check those that have seen something, for good: others wait for a later block."""
    for node in [n for n, observer in observers.items() if observer.tokens]:
        try:
            observers.pop(node).check()
        except NumericsError as error:
            error.args = (f"node '{node.name}' holds NaN or infinity",)
            raise


def _stops(g: Graph, observed: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """The first call of each layer, and the first that nothing observed comes behind."""
    calls = [n for n in g.nodes if n.op in ("call_function", "output") and not is_constant(n)]
    last = max((i for i, n in enumerate(calls) if n in observed), default=-1) + 1
    layers = itertools.groupby(calls[:last], lambda n: n.meta.get("layer"))
    starts = [next(nodes) for _, nodes in layers]
    return [*starts[1:], calls[last]]


def _position(run: StagedRun, observers: Mapping[fx.Node, Observer]) -> Saved:
    there, seen = run.save(), _observed(observers)
    return Saved(there.about | seen.about, there.tensors | seen.tensors)


def _observed(observers: Mapping[fx.Node, Observer]) -> Saved:
    """What all observers keep."""
    saved = Saved({"tokens": {node.name: observer.tokens for node, observer in observers.items()}})
    for node, observer in observers.items():
        saved.tensors |= {f"{node.name}|{key}": t for key, t in observer.tensors().items()}
    return saved


def _restore(observer: Observer, saved: Saved, name: str) -> Observer:
    observer.restore(saved.about["tokens"][name], _of(saved.tensors, name))
    return observer


def _merge(observers: Mapping[fx.Node, Observer], ranks: Ranks) -> None:
    """Let each observer know what those of the other processes have seen."""
    if ranks.count == 1:
        return
    parts = ranks.gather(_observed(observers))
    for node, observer in observers.items():
        first, *others = (_restore(copy.copy(observer), part, node.name) for part in parts)
        for other in others:
            first.merge(other)
        observer.restore(first.tokens, first.tensors())


def _of(tensors: Mapping[str, torch.Tensor], owner: str) -> dict[str, torch.Tensor]:
    start = f"{owner}|"
    return {name[len(start) :]: t for name, t in tensors.items() if name.startswith(start)}


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
