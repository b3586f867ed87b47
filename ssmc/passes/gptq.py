"""GPTQ: choose the integers of quantised weights by what their layers put out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ssmc.core import Context, Graph, Pass, register
from ssmc.core.dialect import operands
from ssmc.errors import NumericsError, PassError, UsageError
from ssmc.passes._calibration import StagedRun
from ssmc.passes._qdq import QuantisedWeight
from ssmc.quant.descent import descend
from ssmc.quant.gptq import Hessian, corrected, gptq


@register
@dataclass(frozen=True)
class Gptq(Pass):
    """Round the weights of in_proj and out_proj so that the outputs err least on calibration text.

    Replaces:  linear(x, dequantize(round(W), s))
    With:      linear(x, dequantize(Q, s')),  Q and s' in the same format: bits, groups, packing

    GPTQ (Frantar et al. 2023, arXiv 2210.17323, algorithm 1). Bits and groups are those of
    quantise, which says what weights become. Inputs are those of the quantised graph: rotated,
    folded, with int8 activations rounded, and behind layers that have their final weights already
    (section 5, 'setup'; there by blocks). Where nearest integers err no more, those stay.

    `asymmetric` takes as what a layer should put out what it puts out in float, on the inputs it
    has there, so that it makes up for what layers before it have lost (Li et al. 2025, 'GPTAQ',
    arXiv 2504.02692, which has the name). `sweeps` is how often coordinate descent passes over
    integers and scales afterwards (Behdin et al. 2023, 'QuantEase', arXiv 2309.01885); one takes
    about as long as GPTQ itself.

    Other layers, `x_proj` and `head` where those are true. `damping` is what is added to the
    diagonal of the Hessian, as a share of its mean (section 4, step 3); `act_order` takes the
    inputs with the largest values first, as the authors' code can.
    """

    name = "gptq"
    stage = "quantise"
    needs = ("quantise",)
    exact_to = None
    beside_scheme = True
    act_order: bool = False
    damping: float = 0.01
    x_proj: bool = False
    head: bool = False
    asymmetric: bool = False
    sweeps: int = 0

    def __post_init__(self) -> None:
        if self.sweeps < 0:
            raise UsageError(f"gptq{{sweeps={self.sweeps}}}: sweeps is at least 0")
        if not 0 <= self.damping < float("inf"):
            raise UsageError(
                f"gptq{{damping={self.damping}}}: damping is a number, at least 0",
                hint="0.01 is usual; more steadies what little text says",
            )

    def run(self, g: Graph, context: Context) -> None:
        """Layer by layer in execution order; the calibration batches run through once."""
        chosen = self._chosen(g)
        left: list[float] = []
        expected = self._expected(g, list(chosen), context)
        for linear, batches in StagedRun(g, list(chosen), context).inputs():
            weight = chosen[linear]
            value = weight.weight
            hessian = Hessian(value.shape[1], value.device)
            if self.asymmetric:
                outputs = torch.zeros_like(value, dtype=torch.float64)
                for x, y in zip(batches, next(expected), strict=True):
                    hessian.add(x)
                    outputs += y.flatten(0, -2).T @ x.flatten(0, -2)
                with _named(linear):
                    value = corrected(value, hessian, outputs, self.damping)
            else:
                for x in batches:
                    hessian.add(x)
            left.append(self._round(g, linear, weight, value, hessian))
        if left:
            share = f"{min(left):.2f} to {max(left):.2f}"
            g.note(f"outputs: {share} of the squared error of nearest integers")

    def _expected(
        self, g: Graph, linears: list[fx.Node], context: Context
    ) -> Iterator[Iterator[Tensor]]:
        """What each layer puts out in float in every batch, without its bias."""
        exact: Graph = g.facts["float"]
        nodes = [exact.node(linear.name) for linear in linears]
        for linear, batches in StagedRun(exact, nodes, replace(context, progress=_quiet)).inputs():
            weight = exact.param(operands(linear)["weight"])
            yield (F.linear(x, weight) for x in batches)

    def _chosen(self, g: Graph) -> dict[fx.Node, QuantisedWeight]:
        """The layers to do, and their weights."""
        if "quantise" not in g.facts:
            raise PassError("no pass left weights to round", hint="name quantise before it")
        weights = {weight.twin: weight for weight in g.facts["quantise"]}
        chosen = {}
        for linear in g.calls("ssmc::linear"):
            weight = weights.get(operands(linear)["weight"])
            if weight is not None and self._takes(g, linear, weight):
                chosen[linear] = weight
        return chosen

    def _takes(self, g: Graph, linear: fx.Node, weight: QuantisedWeight) -> bool:
        role = linear.meta.get("role") or "linear"
        named = {"dt_proj": False, "x_proj": self.x_proj, "head": self.head}
        if not named.get(role, True):
            g.skip(linear, f"{role}=false" if role in self.options() else f"it is a {role}")
        elif len(weight.twin.users) > 1:
            g.skip(linear, "another call reads the same weight")
        else:
            return True
        return False

    def _round(
        self, g: Graph, linear: fx.Node, weight: QuantisedWeight, value: Tensor, hessian: Hessian
    ) -> float:
        """The squared error of the layer's outputs, as a share of that of nearest integers.

        `value` is what is rounded: the weight, or what makes up for errors before it.
        """
        form = weight.form
        with _named(linear):
            q, scale = gptq(value, hessian, form, self.damping, self.act_order)
        q, scale = descend(value, q, scale, hessian, form, self.damping, self.sweeps)
        s = form.scales(weight.weight)
        nearest = hessian.error(form.values(form.round(weight.weight, s), s) - value)
        left = hessian.error(form.values(q, scale) - value)
        if not left < nearest:
            g.skip(linear, "nearest integers err no more")
            return 1.0
        weight.write(g, q, scale)
        g.match(linear)
        return left / nearest


@contextlib.contextmanager
def _named(linear: fx.Node) -> Iterator[None]:
    """Say of an error which layer it is about."""
    try:
        yield
    except NumericsError as error:
        error.args = (f"{linear.name}: {error}",)
        raise


def _quiet(done: int, total: int) -> None:
    """No progress: another run beside this one reports it."""
