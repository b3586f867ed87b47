"""Calibrate: the largest magnitude of every activation to be quantised."""

from __future__ import annotations

from dataclasses import dataclass

from ssmc.core import Context, Graph, Pass, register
from ssmc.passes._calibration import observe, points
from ssmc.quant.observers import Absmax as AbsmaxObserver
from ssmc.quant.observers import Observer


@register
@dataclass(frozen=True)
class Absmax(Pass):
    """Measure the largest magnitude of every activation, per channel, on calibration text.

    Replaces:  nothing
    With:      ranges, from which quantise takes its static scales
    """

    name = "absmax"
    stage = "calibrate"
    needs = ("ssm-sites", "linears")
    preserves = ("ssm-sites", "linears")

    def run(self, g: Graph, context: Context) -> None:
        """Observe every point over the calibration batches."""
        observers = {node: self.observer(name, context) for node, name in points(g).items()}
        observe(g, observers, context)
        g.ranges = {node.name: observer for node, observer in observers.items()}
        for node in observers:
            g.match(node)

    def observer(self, point: str, context: Context) -> Observer:
        """The observer for one point."""
        return AbsmaxObserver()
