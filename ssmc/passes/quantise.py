"""Quantise weights and activations to 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import fx

from ssmc.core import Context, Graph, Pass, register
from ssmc.core.dialect import operands
from ssmc.passes._qdq import Quantiser
from ssmc.passes.linears import Linear
from ssmc.passes.ssm_sites import Site


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
    `granularity=tensor` takes one static scale a tensor, as Quamba does (Chiang et al. 2024, arXiv
    2410.13229, section 4). A, D, dt_bias, norms, biases and states stay float32. `embedding` and
    `head` leave those in float where false.
    """

    name = "quantise"
    stage = "quantise"
    needs = ("ssm-sites", "linears", "fold-norm", "fold-a-log", "absmax")
    exact_to = None
    granularity: Literal["free", "tensor"] = "free"
    embedding: bool = True
    head: bool = True

    def run(self, g: Graph, context: Context) -> None:
        """Quantise in execution order: embedding, sites, linear layers."""
        quantiser = Quantiser(g, "channel" if self.granularity == "free" else "tensor")
        for node in g.calls("ssmc::embedding"):
            self._embedding(g, quantiser, node)
        for site in g.facts["ssm-sites"]:
            self._site(g, quantiser, site)
        for linear in g.facts["linears"]:
            self._linear(g, quantiser, linear)

    def _embedding(self, g: Graph, q: Quantiser, node: fx.Node) -> None:
        if not self.embedding:
            return g.skip(node, "embedding=false")
        node.args = (node.args[0], q.weight(node, node.args[1]))  # type: ignore[arg-type]
        g.match(node)

    def _site(self, g: Graph, q: Quantiser, site: Site) -> None:
        for value in (site.u, site.dt):
            site.scan.replace_input_with(value, q.static(value))
        for value in (site.B, site.C):
            site.scan.replace_input_with(value, self._row(q, value))
        gate = site.gate_norm or site.scan
        if site.z is not None and site.z in gate.all_input_nodes:
            gate.replace_input_with(site.z, q.static(site.z))
        if site.conv1d is not None:
            self._conv1d(g, q, site.conv1d)
        g.match(site.scan)

    def _conv1d(self, g: Graph, q: Quantiser, node: fx.Node) -> None:
        args = operands(node)
        weight = q.weight(node, args["weight"])
        args |= {"x": q.static(args["x"]), "weight": weight, "exact": True}
        node.args = tuple(args.values())
        g.match(node)

    def _linear(self, g: Graph, q: Quantiser, linear: Linear) -> None:
        if linear.role == "head" and not self.head:
            return g.skip(linear.node, "head=false")
        factor = None
        if self.granularity == "free" and linear.input in q.values and q.values[linear.input].scale is not None:
            x, factor = q.folded(linear.input)
        else:
            x = self._row(q, linear.input)
        weight = q.weight(linear.node, linear.weight, factor)
        linear.node.args = (x, weight, operands(linear.node)["bias"], True)
        g.match(linear.node)

    def _row(self, q: Quantiser, value: fx.Node) -> fx.Node:
        return q.dynamic(value) if self.granularity == "free" else q.static(value)
