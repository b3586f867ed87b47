"""Analysis: is the variance of states what the weights say it is?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ssmc.core import Context, Graph, Pass, register
from ssmc.core.dialect import operands
from ssmc.errors import UsageError
from ssmc.passes._rows import Rows, rows_behind
from ssmc.passes.linears import describe
from ssmc.passes.ssm_sites import Site


@dataclass(frozen=True)
class Fit:
    """Correlations of the logarithm of the measured variance of one scan's state.

    With what the weights predict: over all `values`, over `channels` (of all heads), over `places`
    in the state dimension. And, `separable`, with the best product of a factor for each channel
    and one for each place: what decoupled scales can make use of, whether the weights know it or
    not.
    """

    scan: str
    layer: int | None
    values: float
    channels: float
    places: float
    separable: float


@register
@dataclass(frozen=True)
class StateVariance(Pass):
    """Compare the variance of states on calibration text with what the weights predict.

    Replaces:  nothing
    With:      a note for each scan, and a list of `Fit`

    The theorem behind decoupled scales (Chen et al. 2025, 'Q-Mamba', Findings of ACL 2025 551)
    takes the variance of h[p, n] as |W_x[p]|^2 |W_B[n]|^2: with inputs of equal variance and no
    correlation, x[p] and B[n], whose product enters the state, vary like the norms of their
    rows. W_x are the rows of in_proj that give x, times the weight of the norm in front; W_B those
    rows of x_proj (Mamba-1), or of in_proj (Mamba-2), that give B. Convolution, SiLU and decay are
    left out: the correlation says how far the theorem carries in a trained model. `stride` is the
    number of tokens between the states that are looked at.
    """

    name = "state-variance"
    stage = "analyse"
    needs = ("ssm-sites",)
    stride: int = 16

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise UsageError(f"state-variance{{stride={self.stride}}}: stride must be at least 1")

    def run(self, g: Graph, context: Context) -> None:
        """Predict, measure, correlate."""
        predicted = {}
        for site in g.facts["ssm-sites"]:
            state = operands(site.scan)["state"]
            prediction = predict_variance(g, site)
            if not isinstance(state, fx.Node) or prediction is None:
                g.skip(site.scan, "it has no state, or x and B come from no linear layers")
            else:
                predicted[state.name] = (site.scan, prediction)
        measured = measure_variance(g, set(predicted), self.stride, context)
        fits = [fit(scan, measured[name], wanted) for name, (scan, wanted) in predicted.items()]
        for (scan, _), found in zip(predicted.values(), fits, strict=True):
            g.match(scan)
            g.note(
                f"{found.scan}: log variance of its state correlates {found.values:.2f} with the "
                f"weights' (channels {found.channels:.2f}, state dimension {found.places:.2f}), "
                f"{found.separable:.2f} with a product of two factors"
            )
        g.facts[self.name] = fits


def predict_variance(g: Graph, site: Site) -> Tensor | None:
    """|W_x[p]|^2 |W_B[n]|^2 for each value of a scan's state, [..., P, N]; None without weights."""
    x, B = rows_behind(site.u), rows_behind(site.B)
    if x is None or B is None:
        return None
    shape = operands(site.scan)["state"].meta["val"].shape[1:]
    channels = _row_norms(g, x).view(*shape[:-1], 1)
    places = _row_norms(g, B).view(-1, shape[-1])  # a row for each group of heads
    if len(shape) == 3:
        places = places.repeat_interleave(shape[0] // len(places), 0).unsqueeze(1)
    return channels * places


def _row_norms(g: Graph, rows: Rows) -> Tensor:
    """The squared norm of each row, as it stands behind the norm in front of the layer."""
    linear = describe(rows.linear)
    weight = g.param(linear.weight)[rows.start : rows.stop]
    gamma = operands(linear.norm)["weight"] if linear.norm is not None else None
    return (weight if gamma is None else weight * g.param(gamma)).square().sum(1)


def measure_variance(g: Graph, names: set[str], stride: int, context: Context) -> dict[str, Tensor]:
    """The variance of each value [..., P, N] of the states called `names`, each `stride` tokens."""
    moments: dict[str, list[Any]] = {name: [0, 0.0, 0.0] for name in names}
    for batch in context.batches():
        states = None
        for piece in zip(*(x.split(stride, 1) for x in batch), strict=True):
            _, states = g(*piece, states=states)
            for name, kept in moments.items():
                h = states[name].double()
                kept[0] += len(h)
                kept[1] += h.sum(0)
                kept[2] += h.square().sum(0)
    home = g.device or context.device
    return {name: (s2 / n - (s1 / n).square()).to(home) for name, (n, s1, s2) in moments.items()}


def fit(scan: fx.Node, measured: Tensor, predicted: Tensor) -> Fit:
    """How the logarithms of two variances [..., P, N] of a scan's state correlate."""
    tiny = torch.finfo(torch.float32).tiny
    a, b = (v.double().clamp(min=tiny).log().flatten(0, -2) for v in (measured, predicted))
    correlations = (
        _correlation(a.flatten(), b.flatten()),
        _correlation(a.mean(1), b.mean(1)),
        _correlation(a.mean(0), b.mean(0)),
        _correlation(a.flatten(), (a.mean(1, keepdim=True) + a.mean(0)).flatten()),
    )
    return Fit(scan.name, scan.meta.get("layer"), *correlations)


def _correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's; 0 where one of them does not vary."""
    value = torch.corrcoef(torch.stack([a, b]))[0, 1].item()
    return value if math.isfinite(value) else 0.0
