"""GPTQ: choose the integers of quantised weights by what their layers put out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ssmc.core import Context, Graph, Pass, register
from ssmc.core.dialect import operands
from ssmc.errors import NumericsError, PassError, UsageError
from ssmc.passes._calibration import StagedRun
from ssmc.passes._qdq import QuantisedWeight
from ssmc.quant.gptq import Hessian, gptq


@register
@dataclass(frozen=True)
class Gptq(Pass):
    """Round the weights of linear layers so that the outputs err least on calibration text.

    Replaces:  linear(x, dequantize(round(W), s))
    With:      linear(x, dequantize(Q, s')),  Q and s' in the same format: bits, groups, packing

    GPTQ (Frantar et al. 2023, arXiv 2210.17323, algorithm 1). Bits and groups are those of
    quantise, which says what weights become. Inputs are those of the quantised graph: rotated,
    folded, with int8 activations rounded, and behind layers that have their final weights already
    (section 5, 'setup'; there by blocks). Where nearest integers err no more, those stay.

    Not dt_proj, and `x_proj` and `head` where those are true. `damping` is what is added to the
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

    def __post_init__(self) -> None:
        if not 0 <= self.damping < float("inf"):
            raise UsageError(
                f"gptq{{damping={self.damping}}}: damping is a number, at least 0",
                hint="0.01 is usual; more steadies what little text says",
            )

    def run(self, g: Graph, context: Context) -> None:
        """Layer by layer in execution order; the calibration batches run through once."""
        chosen = self._chosen(g)
        left: list[float] = []
        for linear, batches in StagedRun(g, list(chosen), context).inputs():
            weight = chosen[linear]
            hessian = Hessian(weight.weight.shape[1], weight.weight.device)
            for x in batches:
                hessian.add(x)
            left.append(self._round(g, linear, weight, hessian))
        if left:
            share = f"{min(left):.2f} to {max(left):.2f}"
            g.note(f"outputs: {share} of the squared error of nearest integers")

    def _chosen(self, g: Graph) -> dict[fx.Node, QuantisedWeight]:
        """The layers to do, and their weights."""
        if "quantise" not in g.facts:
            raise PassError("no pass left weights to round", hint="name quantise before it")
        weights = {weight.twin: weight for weight in g.facts["quantise"]}
        chosen = {}
        for experts in g.calls("ssmc::expert_linear"):
            g.skip(experts, "experts keep nearest integers: each would need inputs of its own")
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

    def _round(self, g: Graph, linear: fx.Node, weight: QuantisedWeight, hessian: Hessian) -> float:
        """The squared error of the layer's outputs, as a share of that of nearest integers."""
        form, value = weight.form, weight.weight
        try:
            q, scale = gptq(value, hessian, form, self.damping, self.act_order)
        except NumericsError as error:
            error.args = (f"{linear.name}: {error}",)
            raise
        s = form.scales(value)
        nearest = hessian.error(form.values(form.round(value, s), s) - value)
        left = hessian.error(form.values(q, scale) - value)
        if not left < nearest:
            g.skip(linear, "nearest integers err no more")
            return 1.0
        weight.write(g, q, scale)
        g.match(linear)
        return left / nearest
