"""Quantise weights to 8 or 4 bits, and activations to 8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import fx

from ssmc.core import Context, Graph, Pass, register
from ssmc.core.dialect import operands
from ssmc.errors import UsageError
from ssmc.passes._qdq import Quantiser
from ssmc.passes.linears import Linear
from ssmc.passes.ssm_sites import Site

BITS = ((8, 8), (4, 8), (4, 16))
"""Bits of weights and of activations that go together."""


@register
@dataclass(frozen=True)
class Quantise(Pass):
    """W8A8: every projection, the convolution, the scan's operands, embedding and head.

    Replaces:  linear(x, W)
    With:      linear(dequantize(quantize(x, s), s), dequantize(W_int8, s_W), exact)

    `granularity=free` takes every scale that costs nothing at run time: static and per channel
    for what is elementwise between in_proj and out_proj (x, z, u, dt; that of u goes into the
    columns of x_proj), dynamic and per token for what a kernel holds a row of (inputs of in_proj,
    out_proj, dt_proj and the head, B, C), and per output channel for weights.
    `margin` widens those per channel: what one channel reached on the calibration text it exceeds
    on another text more often than a whole tensor does. `granularity=tensor` takes one static
    scale a tensor, as Quamba does (Chiang et al. 2024, arXiv 2410.13229, section 4). A, D, dt_bias,
    norms, biases and states stay float32. `embedding` and `head` leave those in float where false.

    `weights=4` rounds the weights of linear layers to 4 bits with a scale for each `group` of input
    channels; x_proj, dt_proj, embedding and head, small or shared by every token, keep 8 bits.
    `activations=16` (W4A16) leaves scan and convolution in float and rounds the inputs of those
    layers to bfloat16 only. Frantar et al. 2023, arXiv 2210.17323, section 5 (groups).
    """

    name = "quantise"
    stage = "quantise"
    needs = ("ssm-sites", "linears", "fold-norm", "fold-a-log", "absmax")
    exact_to = None
    granularity: Literal["free", "tensor"] = "free"
    embedding: bool = True
    head: bool = True
    margin: float = 1.3
    weights: int = 8
    activations: int = 8
    group: int = 128

    def __post_init__(self) -> None:
        if not self.margin >= 1:
            raise UsageError(f"quantise{{margin={self.margin}}}: margin must be at least 1")
        if self.group < 2 or self.group % 2:
            raise UsageError(f"quantise{{group={self.group}}}: group must be even and at least 2")
        if (self.weights, self.activations) not in BITS:
            raise UsageError(
                f"quantise{{weights={self.weights},activations={self.activations}}}: no such pair",
                hint="weights/activations are 8/8, 4/8 or 4/16",
            )

    def run(self, g: Graph, context: Context) -> None:
        """Quantise in execution order: embedding, sites, linear layers."""
        free = self.granularity == "free"
        quantiser = Quantiser(g, "channel" if free else "tensor", self.margin if free else 1.0)
        for node in g.calls("ssmc::embedding"):
            self._embedding(g, quantiser, node)
        sites = g.facts["ssm-sites"] if self.activations == 8 else []
        for site in sites:
            self._site(g, quantiser, site)
        for conv1d in dict.fromkeys(s.conv1d for s in sites if s.conv1d):
            self._conv1d(g, quantiser, conv1d)
        for linear in g.facts["linears"]:
            self._linear(g, quantiser, linear)

    def _embedding(self, g: Graph, q: Quantiser, node: fx.Node) -> None:
        if not self.embedding:
            g.skip(node, "embedding=false")
            return
        ids, weight = operands(node).values()
        node.args = (ids, q.weight(node, weight))
        g.match(node)

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

    def _linear(self, g: Graph, q: Quantiser, linear: Linear) -> None:
        if linear.role == "head" and not self.head:
            g.skip(linear.node, "head=false")
            return
        if self._to_int4(g, linear):
            self._linear_int4(g, q, linear)
            return
        if self.activations == 16 and linear.role != "head":
            g.skip(linear.node, "activations=16 and its weight keeps 8 bits")
            return
        folded = None
        if (
            self.granularity == "free"
            and linear.input in q.values
            and q.values[linear.input].scale is not None
        ):
            x, folded = q.folded(linear.input), linear.input
        else:
            x = self._row(q, linear.input)
        weight = q.weight(linear.node, linear.weight, folded)
        linear.node.args = (x, weight, operands(linear.node)["bias"], True)
        g.match(linear.node)

    def _to_int4(self, g: Graph, linear: Linear) -> bool:
        if self.weights == 8 or linear.role in ("x_proj", "dt_proj", "head"):
            return False
        width = g.param(linear.weight).shape[1]
        if width % self.group:
            g.note(f"{linear.node.name} keeps 8 bits: {width} is no multiple of {self.group}")
            return False
        return True

    def _linear_int4(self, g: Graph, q: Quantiser, linear: Linear) -> None:
        eight = self.activations == 8
        x = self._row(q, linear.input) if eight else q.bfloat16(linear.input)
        weight = q.weight_int4(linear.node, linear.weight, self.group)
        linear.node.args = (x, weight, operands(linear.node)["bias"], eight)
        g.match(linear.node)

    def _row(self, q: Quantiser, value: fx.Node) -> fx.Node:
        return q.dynamic(value) if self.granularity == "free" else q.static(value)
