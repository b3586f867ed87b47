"""What `quantise` does to the operators of a graph, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import fx

from ssmc.core import Graph
from ssmc.core.dialect import operands
from ssmc.passes._formats import FLOAT, Bits, Override
from ssmc.passes._qdq import QuantisedWeight, Quantiser
from ssmc.passes.linears import Linear
from ssmc.passes.ssm_sites import Site
from ssmc.quant.formats import columns_packed
from ssmc.quant.weights import Range, WeightFormat

GROUP = 128
"""Columns that share a scale where an override asks for few bits and no group is given."""
SMALL = ("x_proj", "dt_proj", "router", "head")
"""Roles that few bits hurt most for what they save, so that only `scope=all` gives them these."""


@dataclass(frozen=True)
class Options:
    """What `quantise` says of all operators; it explains each."""

    granularity: Literal["free", "tensor", "token"] = "free"
    embedding: bool = True
    head: bool = True
    margin: float = 1.3
    weights: int = 8
    activations: int = 8
    group: int | None = None
    range: Range = "absmax"
    scope: Literal["inout", "all"] = "inout"
    weight_scale: Literal["row", "tensor"] | None = None


class Quantising:
    """One run over `g`, by the options of the pass and the overrides that decide for operators."""

    def __init__(self, options: Options, g: Graph, chosen: dict[fx.Node, Override]) -> None:
        self.options, self.g, self.chosen = options, g, chosen
        self.free = options.granularity == "free"
        self.per_tensor = (options.weight_scale or options.granularity) == "tensor"
        self.q = Quantiser(
            g,
            "channel" if self.free else "tensor",
            options.margin if self.free else 1.0,
            "tensor" if self.per_tensor else "channel",
        )

    def run(self) -> list[QuantisedWeight]:
        """Embedding, scans, convolutions, linear layers; every weight that was quantised."""
        for node in self.g.calls("ssmc::embedding"):
            self._embedding(node)
        sites = self._sites()
        for site in sites:
            if self._int8_inputs(site.scan):
                self._site(site)
        for conv1d in dict.fromkeys(s.conv1d for s in sites if s.conv1d):
            if self._int8_inputs(conv1d):
                self._conv1d(conv1d)
        for linear in self.g.facts["linears"]:
            self._linear(linear)
        return list(self.q.weights.values())

    def _left(self, node: fx.Node) -> bool:
        override = self.chosen.get(node)
        if override is None or override.format != FLOAT:
            return False
        self.g.skip(node, f"float by {override}")
        return True

    def _bits(self, node: fx.Node) -> Bits | None:
        """The bits an override names for a call; None: it is as the other options say."""
        return self.chosen[node].bits if node in self.chosen else None

    def _int8_inputs(self, node: fx.Node) -> bool:
        """Whether a scan or a convolution, which have int8 inputs or none, is quantised."""
        if self._left(node):
            return False
        bits = self._bits(node)
        if bits and bits.activations == 16:
            self.g.skip(node, f"float by {self.chosen[node]}")
        return (bits.activations if bits else self.options.activations) == 8

    def _embedding(self, node: fx.Node) -> None:
        if self._left(node):
            return
        if not self.options.embedding and self._bits(node) is None:
            self.g.skip(node, "embedding=false")
            return
        ids, weight = operands(node).values()
        node.args = (ids, self.q.weight(node, weight))
        self.g.match(node)

    def _sites(self) -> list[Site]:
        """The scans that may read integers."""
        sites: list[Site] = self.g.facts["ssm-sites"]
        if self.options.granularity != "token":
            return sites
        for site in sites if self.options.activations == 8 else ():
            self.g.skip(site.scan, "granularity=token leaves scans and convolutions in float")
        return []

    def _site(self, site: Site) -> None:
        for value in (site.u, site.dt):
            site.scan.replace_input_with(value, self.q.static(value))
        for value in (site.B, site.C):
            site.scan.replace_input_with(value, self._row(value))
        gate = site.gate_norm or site.scan
        if site.z is not None and site.z in gate.all_input_nodes:
            gate.replace_input_with(site.z, self.q.static(site.z))
        self.g.match(site.scan)

    def _conv1d(self, node: fx.Node) -> None:
        args = operands(node)
        if args["weight"].op != "get_attr":
            self.g.skip(node, f"its weight is computed, by {args['weight'].name}")
            return
        weight = self.q.weight(node, args["weight"])
        args |= {"x": self.q.static(args["x"]), "weight": weight, "exact": True}
        node.args = tuple(args.values())
        self.g.match(node)

    def _linear(self, linear: Linear) -> None:
        named = self._bits(linear.node)
        if self._left(linear.node):
            return
        if named is None and linear.role == "head" and not self.options.head:
            self.g.skip(linear.node, "head=false")
            return
        scoped = self.options.scope == "all" or linear.role not in SMALL
        weights_only = self.options.activations == 16
        if named is None and weights_only and not scoped and linear.role != "head":
            self.g.skip(linear.node, "out of scope, so in float")
            return
        bits = named or Bits(self.options.weights, self.options.activations)
        x, folded = self._input(linear, bits)
        form = self._fitting(linear, self._format(named) if named or scoped else None)
        weight = self.q.weight(linear.node, linear.weight, form, folded)
        read = {"x": x, "weight": weight, "exact": bits.activations == 8}
        linear.node.args = tuple((operands(linear.node) | read).values())
        self.g.match(linear.node)

    def _format(self, named: Bits | None) -> WeightFormat:
        """The format of a weight, by an override or by the other options."""
        options = self.options
        if named is None:
            per_tensor = self.per_tensor and options.group is None
            return WeightFormat(options.weights, options.group, per_tensor, options.range)
        if named.weights == 8:
            return WeightFormat(tensor=self.per_tensor)
        ends: Range = "mse" if options.range == "absmax" else options.range
        return WeightFormat(named.weights, options.group or GROUP, range=ends)

    def _fitting(self, linear: Linear, form: WeightFormat | None) -> WeightFormat | None:
        """`form` where the layer's width divides into it; None: 8 bits, as layers out of scope."""
        width = self.g.param(linear.weight).shape[-1]
        if form is None or form.fits(width):
            return form
        multiple = form.group or columns_packed(form.bits)
        self.g.note(f"{linear.role} keeps 8 bits: {width} is no multiple of {multiple}")
        return None

    def _input(self, linear: Linear, bits: Bits) -> tuple[fx.Node, fx.Node | None]:
        """The input as the layer reads it, and the value whose scales its weight takes over."""
        if bits.activations == 16:
            return self.q.bfloat16(linear.input), None
        known = self.q.values.get(linear.input)
        if self.free and known is not None and known.scale is not None:
            return self.q.folded(linear.input), linear.input
        return self._row(linear.input), None

    def _row(self, value: fx.Node) -> fx.Node:
        per_tensor = self.options.granularity == "tensor"
        return self.q.static(value) if per_tensor else self.q.dynamic(value)
