"""Pairs of quantize and dequantize around the values and weights of a graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ssmc.core import Graph
from ssmc.errors import PassError
from ssmc.passes._calibration import channels
from ssmc.quant.formats import Granularity, quantize_groups, quantize_weight, scale_for


@dataclass(frozen=True)
class Quantised:
    """A quantised value: its integers, its static scale (None: dynamic), and its float twin."""

    integers: fx.Node
    scale: torch.Tensor | None
    value: fx.Node


class Quantiser:
    """Inserts the pairs, each value and each weight once however many calls read it."""

    def __init__(self, g: Graph, granularity: Granularity, margin: float = 1.0) -> None:
        self.g = g
        self.margin = margin
        self.granularity: Granularity = granularity
        self.values: dict[fx.Node, Quantised] = {}
        self.weights: dict[tuple[fx.Node, fx.Node | None], fx.Node] = {}
        self.unit: fx.Node | None = None

    def static(self, value: fx.Node) -> fx.Node:
        """`value` through 8 bits with a scale from calibration, per channel or per tensor."""
        if value not in self.values:
            scale = self._static_scale(value)
            param = self.g.new_param(f"scales.{value.name}", scale)
            with self.g.after(value):
                integers = self.g.call("ssmc::quantize", value, param, like=value, suffix="q")
            self.values[value] = Quantised(
                integers, scale, self._dequantize(value, integers, param)
            )
        return self.values[value].value

    def dynamic(self, value: fx.Node) -> fx.Node:
        """`value` through 8 bits with a scale for each token."""
        if value not in self.values:
            g = self.g
            with g.after(value):
                pair = g.call("ssmc::quantize_dynamic", value, like=value, suffix="q")
            with g.after(pair):
                scale = g.call("getitem", pair, 1, like=value, suffix="scale")
            with g.after(pair):
                integers = g.call("getitem", pair, 0, like=value, suffix="int8")
            self.values[value] = Quantised(
                integers, None, self._dequantize(value, scale, integers, scale)
            )
        return self.values[value].value

    def folded(self, value: fx.Node) -> fx.Node:
        """The integers of a value quantised per channel, as floats: its scales are left out."""
        self.unit = self.unit or self.g.new_param("scales.unit", torch.ones(()))
        return self._dequantize(value, self.values[value].integers, self.unit)

    def weight(self, user: fx.Node, weight: fx.Node, folded: fx.Node | None = None) -> fx.Node:
        """A weight [N, K] through 8 bits, in front of `user`, which is the first to read it.

        Its columns are times the scales of the value that is `folded` into them, if one is.
        """
        if (weight, folded) in self.weights:
            return self.weights[weight, folded]
        value = self.g.param(weight)
        if folded is not None:
            value = value * self.values[folded].scale  # type: ignore[operator]
        integers, scale = quantize_weight(value, self.granularity, 8)
        q = self.g.new_param(f"{weight.target}_int8", integers)
        s = self.g.new_param(f"{weight.target}_scale", scale)
        with self.g.before(user):
            twin = self.g.call("ssmc::dequantize", q, s, like=user, suffix="weight")
        self.weights[weight, folded] = twin
        return twin

    def weight_int4(self, user: fx.Node, weight: fx.Node, group: int) -> fx.Node:
        """A weight [N, K] through 4 bits in groups of input channels, in front of `user`."""
        packed, scale = quantize_groups(self.g.param(weight), group)
        q = self.g.new_param(f"{weight.target}_int4", packed)
        s = self.g.new_param(f"{weight.target}_scale", scale)
        with self.g.before(user):
            return self.g.call("ssmc::dequantize_groups", q, s, like=user, suffix="weight")

    def bfloat16(self, value: fx.Node) -> fx.Node:
        """`value` rounded to bfloat16, in float32."""
        with self.g.after(value):
            rounded = self.g.call("to_dtype", value, torch.bfloat16, like=value, suffix="bf16")
        with self.g.after(rounded):
            twin = self.g.call("to_dtype", rounded, torch.float32, like=value, suffix="rounded")
        return twin

    def _static_scale(self, value: fx.Node) -> torch.Tensor:
        if value.name not in self.g.ranges:
            raise PassError(
                f"no range was measured for '{value.name}'", hint="name absmax or percentile"
            )
        ranges = self.g.ranges[value.name]
        per_channel = self.granularity == "channel"
        absmax = ranges.channel().reshape(channels(value)) if per_channel else ranges.tensor()
        return scale_for(absmax.float() * self.margin)

    def _dequantize(self, value: fx.Node, *pair: fx.Node) -> fx.Node:
        integers, scale = pair[-2:]
        with self.g.after(pair[0]):
            return self.g.call("ssmc::dequantize", integers, scale, like=value, suffix="dq")
