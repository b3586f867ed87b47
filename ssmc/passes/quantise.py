"""Quantise weights to 8 bits and fewer, and activations to 8, to bfloat16, or not at all."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from torch import fx

from ssmc.core import Context, Graph, Pass, register
from ssmc.core.dialect import operands
from ssmc.errors import UsageError
from ssmc.passes._formats import FLOAT, Bits, Override, Overrides, choose, read_override
from ssmc.passes._qdq import Quantiser
from ssmc.passes.linears import Linear
from ssmc.passes.ssm_sites import Site
from ssmc.quant.formats import columns_packed
from ssmc.quant.weights import Range, WeightFormat

GROUP = 128
"""Columns that share a scale where an override asks for few bits and no group is given."""
SMALL = ("x_proj", "dt_proj", "router", "head")
"""Roles that few bits hurt most for what they save, so that only `scope=all` gives them these."""
Chosen = dict[fx.Node, Override]


@register
@dataclass(frozen=True)
class Quantise(Pass):
    """W8A8: every linear layer, the convolution, the scan's operands, embedding and head.

    Replaces:  linear(x, W)
    With:      linear(dequantize(quantize(x, s), s), dequantize(W_int8, s_W), exact)

    `granularity=free` takes every scale that costs nothing at run time: static and per channel
    for what is elementwise between in_proj and out_proj (x, z, u, dt; that of u goes into the
    columns of x_proj), dynamic and per token for what a kernel holds a row of (inputs of all other
    linear layers, B, C), and per output channel for weights.
    `margin` widens those per channel: what one channel reached on the calibration text it exceeds
    on another text more often than a whole tensor does. `granularity=tensor` takes one static
    scale a tensor, as Quamba does (Chiang et al. 2024, arXiv 2410.13229, section 4), or one for
    each cluster of sort-and-cluster, where that ran. `granularity=token` quantises linear layers
    and embedding alone, with a dynamic scale for each token that a layer reads, as is usual for
    transformers; convolution and scan stay in float. `weight_scale=tensor` or `row` is what shares
    a scale in weights, by default a tensor with granularity=tensor, else a row. A, D, dt_bias,
    norms, biases and states stay float32. `embedding` and `head` leave those in float where false.

    `weights` is the bits, 2 to 8, of every linear layer but x_proj, dt_proj, router and head, with
    `scope=all` of these as well; `group` input channels share a scale (Frantar et al. 2023, arXiv
    2210.17323, section 5), without it a row or tensor. Other layers, and those whose width is no
    multiple of it, keep 8 bits. `range=mse` clips these weights where their squared error is least,
    `range=tanh` at three standard deviations, with levels spaced by a hyperbolic tangent
    (`ssmc/quant/weights.py`).

    `activations=16` quantises weights only: nothing is int8 between layers, and the linear layers
    round their inputs to bfloat16, in which every kernel for such weights multiplies. Layers out of
    scope stay in float; the head reads 8 bits, those of the embedding where it is tied to it.

    `overrides` gives single operators other formats, as PATTERN:FORMAT with `;` between them:
    `layer.3:w4a16;out_proj:w4a8;head:float`. A pattern is a role, a layer, both (`layer.3.in_proj`)
    or a path of modules, each part with wildcards; the last that matches decides, whatever `scope`,
    `embedding` and `head` say. A format is wNaM (N bits of the weight, 2 to 8, M of the inputs, 8
    or 16), `float`, or `default` (what the other options say). Fewer than 8 bits come in groups of
    `group` or 128, with `range=mse` where no range is given. Choosing bits for each block is W4AX
    of Quamba2 (Chiang et al. 2025, arXiv 2503.22879). Embedding and convolution have
    8 bits or none, as has the scan, which a16 leaves in float.
    """

    name = "quantise"
    stage = "quantise"
    needs = ("ssm-sites", "linears", "fold-norm", "fold-a-log", "absmax")
    exact_to = None
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
    overrides: Overrides = ()

    def __post_init__(self) -> None:
        if not self.margin >= 1:
            raise UsageError(f"quantise{{margin={self.margin}}}: margin must be at least 1")
        if not 2 <= self.weights <= 8:
            raise UsageError(
                f"quantise{{weights={self.weights}}}: weights has 2 to 8 bits",
                hint="8 and 4 have kernels of their own",
            )
        if self.activations not in (8, 16):
            raise UsageError(
                f"quantise{{activations={self.activations}}}: activations has 8 or 16 bits",
                hint="16 quantises weights only",
            )
        named = [override.bits for override in map(read_override, self.overrides)]
        few = [bits for bits in named if bits and bits.weights < 8]
        own = Bits(self.weights, self.activations)
        if self.range == "tanh" and any(bits.activations == 8 for bits in (own, *few)):
            raise UsageError(
                "quantise{range=tanh}: no integer product has levels that are not uniform",
                hint="add activations=16, or leave range=tanh out",
            )
        for bits in (own, *few):
            self._check_group(bits.weights)

    def _check_group(self, bits: int) -> None:
        multiple = columns_packed(bits)
        if self.group is not None and (self.group < 2 or self.group % multiple):
            raise UsageError(
                f"quantise{{group={self.group}}}: group must be at least 2 and a multiple of "
                f"{multiple}, which fill whole bytes at {bits} bits",
                hint="common groups are 32, 64 and 128; group=none is one scale a row",
            )

    def check(self, g: Graph) -> None:
        """UsageError for an override that matches no operator of `g`."""
        choose(self.overrides, g)

    def run(self, g: Graph, context: Context) -> None:
        """Quantise in execution order: embedding, sites, linear layers."""
        quantiser = self._quantiser(g)
        chosen = choose(self.overrides, g)
        for node in g.calls("ssmc::embedding"):
            self._embedding(g, quantiser, node, chosen)
        sites = self._sites(g)
        for site in sites:
            if self._int8_inputs(g, site.scan, chosen):
                self._site(g, quantiser, site)
        for conv1d in dict.fromkeys(s.conv1d for s in sites if s.conv1d):
            if self._int8_inputs(g, conv1d, chosen):
                self._conv1d(g, quantiser, conv1d)
        for linear in g.facts["linears"]:
            self._linear(g, quantiser, linear, chosen)
        g.facts[self.name] = list(quantiser.weights.values())
        if chosen:
            counts = Counter(override.format for override in chosen.values()).items()
            g.note(f"overrides: {', '.join(f'{count} {form}' for form, count in counts)}")

    def _quantiser(self, g: Graph) -> Quantiser:
        free = self.granularity == "free"
        return Quantiser(
            g,
            "channel" if free else "tensor",
            self.margin if free else 1.0,
            "tensor" if self._weights_per_tensor else "channel",
            g.facts.get("sort-and-cluster"),
        )

    @property
    def _weights_per_tensor(self) -> bool:
        return (self.weight_scale or self.granularity) == "tensor"

    def _left(self, g: Graph, node: fx.Node, chosen: Chosen) -> bool:
        override = chosen.get(node)
        if override is None or override.format != FLOAT:
            return False
        g.skip(node, f"float by {override}")
        return True

    def _bits(self, node: fx.Node, chosen: Chosen) -> Bits | None:
        """The bits an override names for a call; None: it is as the other options say."""
        return chosen[node].bits if node in chosen else None

    def _int8_inputs(self, g: Graph, node: fx.Node, chosen: Chosen) -> bool:
        """Whether a scan or a convolution, which have int8 inputs or none, is quantised."""
        if self._left(g, node, chosen):
            return False
        bits = self._bits(node, chosen)
        if bits and bits.activations == 16:
            g.skip(node, f"float by {chosen[node]}")
        return (bits.activations if bits else self.activations) == 8

    def _embedding(self, g: Graph, q: Quantiser, node: fx.Node, chosen: Chosen) -> None:
        if self._left(g, node, chosen):
            return
        if not self.embedding and self._bits(node, chosen) is None:
            g.skip(node, "embedding=false")
            return
        ids, weight = operands(node).values()
        node.args = (ids, q.weight(node, weight))
        g.match(node)

    def _sites(self, g: Graph) -> list[Site]:
        """The scans that may read integers."""
        sites: list[Site] = g.facts["ssm-sites"]
        if self.granularity != "token":
            return sites
        for site in sites if self.activations == 8 else ():
            g.skip(site.scan, "granularity=token leaves scans and convolutions in float")
        return []

    def _site(self, g: Graph, q: Quantiser, site: Site) -> None:
        for value in (site.u, site.dt):
            site.scan.replace_input_with(value, q.static(value))
        for value in (site.B, site.C):
            site.scan.replace_input_with(value, self._row(q, value))
        gate = site.gate_norm or site.scan
        if site.z is not None and site.z in gate.all_input_nodes:
            gate.replace_input_with(site.z, q.static(site.z))
        g.match(site.scan)

    def _conv1d(self, g: Graph, q: Quantiser, node: fx.Node) -> None:
        args = operands(node)
        if args["weight"].op != "get_attr":
            g.skip(node, f"its weight is computed, by {args['weight'].name}")
            return
        weight = q.weight(node, args["weight"])
        args |= {"x": q.static(args["x"]), "weight": weight, "exact": True}
        node.args = tuple(args.values())
        g.match(node)

    def _linear(self, g: Graph, q: Quantiser, linear: Linear, chosen: Chosen) -> None:
        named = self._bits(linear.node, chosen)
        if self._left(g, linear.node, chosen):
            return
        if named is None and linear.role == "head" and not self.head:
            g.skip(linear.node, "head=false")
            return
        scoped = self.scope == "all" or linear.role not in SMALL
        if named is None and self.activations == 16 and not scoped and linear.role != "head":
            g.skip(linear.node, "out of scope, so in float")
            return
        bits = named or Bits(self.weights, self.activations)
        x, folded = self._input(q, linear, bits)
        form = self._format(named) if named or scoped else None
        weight = q.weight(linear.node, linear.weight, self._fitting(g, linear, form), folded)
        read = {"x": x, "weight": weight, "exact": bits.activations == 8}
        linear.node.args = tuple((operands(linear.node) | read).values())
        g.match(linear.node)

    def _format(self, named: Bits | None) -> WeightFormat:
        """The format of a weight, by an override or by the other options."""
        if named is None:
            per_tensor = self._weights_per_tensor and self.group is None
            return WeightFormat(self.weights, self.group, per_tensor, self.range)
        if named.weights == 8:
            return WeightFormat(tensor=self._weights_per_tensor)
        ends: Range = "mse" if self.range == "absmax" else self.range
        return WeightFormat(named.weights, self.group or GROUP, range=ends)

    def _fitting(self, g: Graph, linear: Linear, form: WeightFormat | None) -> WeightFormat | None:
        """`form` where the layer's width divides into it; None: 8 bits, as layers out of scope."""
        width = g.param(linear.weight).shape[-1]
        if form is None or form.fits(width):
            return form
        multiple = form.group or columns_packed(form.bits)
        g.note(f"{linear.role} keeps 8 bits: {width} is no multiple of {multiple}")
        return None

    def _input(self, q: Quantiser, linear: Linear, bits: Bits) -> tuple[fx.Node, fx.Node | None]:
        """The input as the layer reads it, and the value whose scales its weight takes over."""
        if bits.activations == 16:
            return q.bfloat16(linear.input), None
        known = q.values.get(linear.input)
        if self.granularity == "free" and known is not None and known.scale is not None:
            return q.folded(linear.input), linear.input
        return self._row(q, linear.input), None

    def _row(self, q: Quantiser, value: fx.Node) -> fx.Node:
        return q.static(value) if self.granularity == "tensor" else q.dynamic(value)
