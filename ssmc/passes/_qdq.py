"""Pairs of quantize and dequantize around the values and weights of a graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ssmc.core import Graph
from ssmc.errors import PassError
from ssmc.passes._calibration import channels
from ssmc.quant.formats import Granularity, scale_for
from ssmc.quant.weights import WeightFormat, stored_name


@dataclass(frozen=True)
class Quantised:
    """A quantised value: its integers, its static scale (None: dynamic), and its float twin."""

    integers: fx.Node
    scale: torch.Tensor | None
    value: fx.Node


@dataclass(frozen=True)
class QuantisedWeight:
    """What became of a weight [N, K] in float (with what was folded into it), and in what format.

    `twin` is the call that dequantises it, from the parameters of integers and scales. Of stacked
    experts the weight is [E, N, K], whose rows are quantised as those of one matrix.
    """

    twin: fx.Node
    weight: torch.Tensor
    form: WeightFormat

    def write(self, g: Graph, q: torch.Tensor, scale: torch.Tensor) -> None:
        """Put other integers [N, K] and scales [N, G] in the place of those it has."""
        stored = _store(self.form, q, scale, self.weight.shape[:-1])
        for node, value in zip(self.twin.args[:2], stored, strict=True):
            g.set_param(node, value)  # type: ignore[arg-type]


class Quantiser:
    """Inserts the pairs, each value and each weight once however many calls read it.

    `granularity` is that of static scales, `weights` that of weights in 8 bits. Where a value has
    `clusters` (int64, of its channels' shape) in its meta, its channels share scales as these say,
    instead of one a tensor.
    """

    def __init__(
        self,
        g: Graph,
        granularity: Granularity,
        margin: float = 1.0,
        weights: Granularity = "channel",
    ) -> None:
        self.g = g
        self.margin = margin
        self.granularity: Granularity = granularity
        self.eight_bits = WeightFormat(tensor=weights == "tensor")
        self.values: dict[fx.Node, Quantised] = {}
        self.weights: dict[tuple[fx.Node, WeightFormat, fx.Node | None], QuantisedWeight] = {}
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

    def weight(
        self,
        user: fx.Node,
        weight: fx.Node,
        form: WeightFormat | None = None,
        folded: fx.Node | None = None,
    ) -> fx.Node:
        """A weight [..., N, K] through `form`, in front of `user`, which is the first to read it.

        By default 8 bits. Its columns are times the scales of the value that is `folded` into
        them, if one is.
        """
        form = form or self.eight_bits
        key = (weight, form, folded)
        if key not in self.weights:
            value = self.g.param(weight)
            if folded is not None:
                value = self.g.keep(value * self.values[folded].scale)  # type: ignore[operator]
            twin = self._stored(user, str(weight.target), value, form)
            self.weights[key] = QuantisedWeight(twin, value, form)
        return self.weights[key].twin

    def _stored(self, user: fx.Node, name: str, value: torch.Tensor, form: WeightFormat) -> fx.Node:
        rows = value.flatten(0, -2)
        scale = form.scales(rows)
        stored = _store(form, form.round(rows, scale), scale, value.shape[:-1])
        q = self.g.new_param(stored_name(name, form.bits), stored[0])
        s = self.g.new_param(f"{name}_scale", stored[1])
        with self.g.before(user):
            if form.packed:
                args = (q, s, form.bits, form.range == "tanh")
                return self.g.call("ssmc::dequantize_groups", *args, like=user, suffix="weight")
            return self.g.call("ssmc::dequantize", q, s, like=user, suffix="weight")

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
        if self.granularity == "channel":
            absmax = ranges.channel().reshape(channels(value))
        elif "clusters" in value.meta:
            absmax = _shared(ranges.channel(), value.meta["clusters"])
        else:
            absmax = ranges.tensor()
        return scale_for(absmax.float() * self.margin)

    def _dequantize(self, value: fx.Node, *pair: fx.Node) -> fx.Node:
        integers, scale = pair[-2:]
        with self.g.after(pair[0]):
            return self.g.call("ssmc::dequantize", integers, scale, like=value, suffix="dq")


def _store(
    form: WeightFormat, q: torch.Tensor, scale: torch.Tensor, rows: torch.Size
) -> list[torch.Tensor]:
    """Integers and scales as the graph holds them, with rows [N], or [E, N] of stacked experts."""
    return [t.unflatten(0, rows) if t.dim() else t for t in form.store(q, scale)]


def _shared(absmax: torch.Tensor, clusters: torch.Tensor) -> torch.Tensor:
    """The largest of absmax [C] in the cluster of each channel, of the shape of `clusters`."""
    labels = clusters.to(absmax.device)
    largest = absmax.new_zeros(int(labels.max()) + 1)
    return largest.scatter_reduce(0, labels.flatten(), absmax, "amax")[labels]
