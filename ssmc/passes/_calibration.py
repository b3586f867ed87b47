"""Ranges of activations, measured on calibration text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ssmc.core import Context, Graph
from ssmc.core.graph import check_finite
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
