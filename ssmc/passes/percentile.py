"""Calibrate: clip the SSM input at a percentile of its magnitudes."""

from __future__ import annotations

from dataclasses import dataclass

from ssmc.core import Context, register
from ssmc.errors import UsageError
from ssmc.passes._calibration import tokens
from ssmc.passes.absmax import Absmax
from ssmc.quant.observers import Observer
from ssmc.quant.observers import Percentile as PercentileObserver


@register
@dataclass(frozen=True)
class Percentile(Absmax):
    """Measure ranges as absmax does, but the SSM input u up to the p-quantile of its magnitudes.

    Replaces:  nothing
    With:      ranges, from which quantise takes its static scales

    Quamba (Chiang et al. 2024, arXiv 2410.13229), section 4.2: a few rare peaks of u cost all
    its other values their precision.
    """

    name = "percentile"
    stage = "calibrate"
    provides = ("absmax",)
    p: float = 0.99999

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise UsageError(f"percentile{{p={self.p}}}: p must be above 0 and at most 1")

    def observer(self, point: str, context: Context) -> Observer:
        """A percentile for u, absmax elsewhere."""
        if point == "u":
            return PercentileObserver(self.p, tokens(context))
        return super().observer(point, context)
