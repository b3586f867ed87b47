"""Which rows of which linear layer a value comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx

from ssmc.core import is_call
from ssmc.core.dialect import operands
from ssmc.passes._calibration import channels
from ssmc.passes._follow import unscaled

_CHANNELWISE = (
    "ssmc::causal_conv1d", "ssmc::hadamard", "ssmc::layer_norm", "ssmc::rms_norm",
    "ssmc::rms_norm_gated", "flatten", "getitem", "reshape", "to_dtype", "unflatten",
)  # fmt: skip
"""Calls whose result has the channels of their first operand."""


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of the weight of `linear`, a call."""

    linear: fx.Node
    start: int
    stop: int


def rows_behind(value: Any) -> Rows | None:
    """The rows that compute `value`, seen through convolutions, norms, splits and reshapes.

    Multiples of channels by constants are seen through as well, whatever they are. None where
    something else computes it.
    """
    start, width = 0, math.prod(channels(value))
    while not is_call(value, "ssmc::linear"):
        if is_call(value, "getitem") and is_call(value.args[0], "split"):
            parts, index = value.args
            value, sizes, *_ = operands(parts).values()
            start += sum(sizes[:index])
        elif is_call(value, *_CHANNELWISE):
            value = next(iter(operands(value).values()))
        elif (inner := unscaled(value)) is not None:
            value = inner
        else:
            return None
    return Rows(value, start, start + width)
