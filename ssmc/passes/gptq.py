"""GPTQ: choose the integers of quantised weights by what their layers put out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ssmc.core import Context, Graph, Pass, is_call, register
from ssmc.core.dialect import operands
from ssmc.core.ranks import Ranks
from ssmc.core.saved import Saved
from ssmc.errors import NumericsError, PassError, UsageError
from ssmc.passes._qdq import QuantisedWeight
from ssmc.passes._staged import StagedRun
from ssmc.passes._transformer import LINEARS
from ssmc.quant.descent import descend
from ssmc.quant.gptq import Hessian, corrected, gptq
from ssmc.quant.weights import WeightFormat

ROWS = 2048
"""Rows of a matrix that are rounded together."""
Part = tuple[Tensor, Tensor, Hessian]
"""A matrix, what is rounded in its place, and the Hessian of its inputs."""


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

    `asymmetric` takes as what a layer should put out what it puts out in float, on the inputs it
    has there, so that it makes up for what layers before it have lost (Li et al. 2025, 'GPTAQ',
    arXiv 2504.02692, which has the name). `sweeps` is how often coordinate descent passes over
    integers and scales afterwards (Behdin et al. 2023, 'QuantEase', arXiv 2309.01885); one takes
    about as long as GPTQ itself. Stacked experts are each rounded on the tokens that chose it, and
    not asymmetrically: in float a token may choose others.

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
        matrices = [n for n, weight in chosen.items() if self.asymmetric and not _experts(weight)]
        run = StagedRun(g, list(chosen), context)
        exact = self._exact(g, matrices, context)
        left = _restored(g, run, exact, context)
        expected = _outputs(exact)
        for linear, batches in run.inputs():
            weight = chosen[linear]
            value = weight.weight.to(context.device)
            with _named(linear):
                if linear in matrices:
                    parts = [self._corrected(value, batches, next(expected), context.ranks)]
                else:
                    parts = _parts(value, batches, context.ranks)
                left.append(self._round(g, linear, weight, parts, context.ranks))
            if context.log.due():
                context.log.save(g, _position(run, exact, left))
        if left:
            share = f"{min(left):.2f} to {max(left):.2f}"
            g.note(f"outputs: {share} of the squared error of nearest integers")

    def _exact(self, g: Graph, linears: list[fx.Node], context: Context) -> StagedRun:
        """The calibration batches in the graph as it was in float, stopping at the same layers."""
        exact: Graph = g.facts["float"]
        nodes = [exact.node(linear.name) for linear in linears]
        return StagedRun(exact, nodes, replace(context, progress=_quiet))

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

    def _corrected(
        self, weight: Tensor, batches: Iterator[Tensor], expected: Iterator[Tensor], ranks: Ranks
    ) -> Part:
        """The weight that makes up for errors before it, to be rounded in place of `weight`."""
        hessian = Hessian(weight.shape[1], weight.device, later=ranks.number > 0)
        outputs, terms = torch.zeros_like(weight, dtype=torch.float64), []
        for x, y in zip(batches, expected, strict=True):
            hessian.add(x)
            term = y.flatten(0, -2).T @ x.flatten(0, -2)
            if hessian.later:
                terms.append(term.to("cpu", non_blocking=True))
            else:
                outputs += term
        _settle(hessian, ranks)
        ranks.add_up(outputs, terms)
        return weight, corrected(weight, hessian, outputs, self.damping), hessian

    def _round(
        self,
        g: Graph,
        linear: fx.Node,
        weight: QuantisedWeight,
        parts: Sequence[Part],
        ranks: Ranks,
    ) -> float:
        """The squared error of the layer's outputs, as a share of that of nearest integers."""
        jobs = [(part, rows) for part in range(len(parts)) for rows in _tiles(weight)]
        done = Saved({}, {})
        for job in ranks.deal(range(len(jobs))):
            part, rows = jobs[job]
            q, scale, *errors = self._choose(*parts[part], rows, weight.form)
            done.about[str(job)] = errors
            done.tensors |= {f"q{job}": q, f"s{job}": scale}
        found = ranks.gather(done)
        all_of = Saved({}, {})
        for one in found:
            all_of.about |= one.about
            all_of.tensors |= one.tensors
        return self._write(g, linear, weight, parts, all_of)

    def _write(
        self,
        g: Graph,
        linear: fx.Node,
        weight: QuantisedWeight,
        parts: Sequence[Part],
        found: Saved,
    ) -> float:
        """Put in place what was found for each tile of rows, where a matrix errs less with it."""
        tiles = len(_tiles(weight))
        integers, scales = [], []
        left = nearest = 0.0
        for number, (matrix, _, _) in enumerate(parts):
            jobs = range(number * tiles, (number + 1) * tiles)
            lefts, errors = (sum(found.about[str(j)][i] for j in jobs) for i in (0, 1))
            if lefts < errors:
                integers += [found.tensors[f"q{job}"].to(matrix.device) for job in jobs]
                scales += [found.tensors[f"s{job}"].to(matrix.device) for job in jobs]
            else:
                scales.append(weight.form.scales(matrix))
                integers.append(weight.form.round(matrix, scales[-1]))
            left, nearest = left + min(lefts, errors), nearest + errors
        if not left < nearest:
            g.skip(linear, "nearest integers err no more")
            return 1.0
        weight.write(g, torch.cat(integers), torch.cat(scales))
        g.match(linear)
        return left / nearest

    def _choose(
        self, weight: Tensor, value: Tensor, hessian: Hessian, rows: slice, form: WeightFormat
    ) -> tuple[Tensor, Tensor, float, float]:
        """Integers and scales of rows, the error they leave, and that of nearest integers."""
        weight, value = weight[rows], value[rows]
        s = form.scales(weight)
        nearest = form.round(weight, s)
        error = hessian.error(form.values(nearest, s) - value)
        if not error:  # an expert that no token chose has no error
            return nearest, s, error, error
        q, scale = gptq(value, hessian, form, self.damping, self.act_order)
        q, scale = descend(value, q, scale, hessian, form, self.damping, self.sweeps)
        return q, scale, hessian.error(form.values(q, scale) - value), error


def _tiles(weight: QuantisedWeight) -> list[slice]:
    """Rows of a matrix that are rounded together, whatever the number of processes."""
    count = weight.weight.shape[-2]
    size = count if weight.form.tensor else ROWS  # of a scale for all, all have to know
    return [slice(first, first + size) for first in range(0, count, size)]


def _settle(hessian: Hessian, ranks: Ranks) -> None:
    """Add up what the batches of all processes gave."""
    ranks.add_up(hessian.matrix, hessian.terms)
    hessian.terms.clear()


def _outputs(exact: StagedRun) -> Iterator[Iterator[Tensor]]:
    """What each layer puts out in float in every batch, without its bias."""
    for linear, batches in exact.inputs():
        weight = exact.g.param(operands(linear)["weight"]).to(exact.context.device)
        yield (F.linear(x, weight) for x in batches)


def _position(run: StagedRun, exact: StagedRun, left: list[float]) -> Saved:
    here, there = run.save(), exact.save("float ")
    return Saved(here.about | there.about | {"left": left}, here.tensors | there.tensors)


def _restored(g: Graph, run: StagedRun, exact: StagedRun, context: Context) -> list[float]:
    """Where an earlier run of the pass came: what it left of each layer's squared error."""
    saved = context.log.restore(g)
    run.restore(saved)
    exact.restore(saved, "float ")
    return list(saved.about["left"]) if saved else []


def _experts(weight: QuantisedWeight) -> bool:
    """Whether a weight is that of stacked experts, [experts, N, K]."""
    return weight.weight.dim() > 2


def _parts(weight: Tensor, batches: Iterator[Any], ranks: Ranks) -> list[Part]:
    """A weight with its inputs; of stacked experts each, with those of the tokens that chose it."""
    *experts, _, width = weight.shape
    count = experts[0] if experts else 1
    hessians = [Hessian(width, weight.device, later=ranks.number > 0) for _ in range(count)]
    for given in batches:
        if not experts:
            hessians[0].add(given)
            continue
        x, index = given
        each = x.unsqueeze(2).expand(*index.shape, width) if x.dim() == 3 else x
        for expert, hessian in enumerate(hessians):
            hessian.add(each[index == expert])
    for hessian in hessians:
        _settle(hessian, ranks)
    matrices = weight.view(count, -1, width)
    return [(m, m, hessian) for m, hessian in zip(matrices, hessians, strict=True)]


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
