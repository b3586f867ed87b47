"""GPTQ: choose the integers of quantised weights by what their layers put out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ssmc.core import Context, Graph, Pass, is_call, register
from ssmc.core.dialect import operands
from ssmc.errors import NumericsError, PassError, UsageError
from ssmc.passes._calibration import StagedRun
from ssmc.passes._qdq import QuantisedWeight
from ssmc.passes._transformer import LINEARS
from ssmc.quant.gptq import Hessian, gptq
from ssmc.quant.weights import WeightFormat


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
            left.append(self._round(g, linear, weight, _hessians(weight, batches)))
        if left:
            share = f"{min(left):.2f} to {max(left):.2f}"
            g.note(f"outputs: {share} of the squared error of nearest integers")

    def _chosen(self, g: Graph) -> dict[fx.Node, QuantisedWeight]:
        """The layers to do, and their weights."""
        if "quantise" not in g.facts:
            raise PassError("no pass left weights to round", hint="name quantise before it")
        weights = {weight.twin: weight for weight in g.facts["quantise"]}
        chosen = {}
        for linear in (n for n in g.nodes if is_call(n, *LINEARS)):
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
        self, g: Graph, linear: fx.Node, weight: QuantisedWeight, hessians: Sequence[Hessian]
    ) -> float:
        """The squared error of the layer's outputs, as a share of that of nearest integers."""
        width = weight.weight.shape[-1]
        matrices = weight.weight.view(len(hessians), -1, width)
        try:
            found = [
                self._choose(matrix, hessian, weight.form)
                for matrix, hessian in zip(matrices, hessians, strict=True)
            ]
        except NumericsError as error:
            error.args = (f"{linear.name}: {error}",)
            raise
        integers, scales, lefts, errors = zip(*found, strict=True)
        left, nearest = sum(lefts), sum(errors)
        if not left < nearest:
            g.skip(linear, "nearest integers err no more")
            return 1.0
        weight.write(g, torch.cat(integers), torch.cat(scales))
        g.match(linear)
        return left / nearest

    def _choose(
        self, value: Tensor, hessian: Hessian, form: WeightFormat
    ) -> tuple[Tensor, Tensor, float, float]:
        """Integers and scales of a matrix, the error they leave, and that of nearest integers."""
        s = form.scales(value)
        nearest = form.round(value, s)
        error = hessian.error(form.values(nearest, s) - value)
        if not error:  # an expert that no token chose has no error
            return nearest, s, error, error
        q, scale = gptq(value, hessian, form, self.damping, self.act_order)
        left = hessian.error(form.values(q, scale) - value)
        return (q, scale, left, error) if left < error else (nearest, s, error, error)


def _hessians(weight: QuantisedWeight, batches: Iterator[Any]) -> list[Hessian]:
    """That of a layer's inputs; of stacked experts one for each, of the tokens that chose it."""
    *experts, _, width = weight.weight.shape
    hessians = [Hessian(width, weight.weight.device) for _ in range(*experts or (1,))]
    for given in batches:
        if not experts:
            hessians[0].add(given)
            continue
        x, index = given
        each = x.unsqueeze(2).expand(*index.shape, width) if x.dim() == 3 else x
        for expert, hessian in enumerate(hessians):
            hessian.add(each[index == expert])
    return hessians
