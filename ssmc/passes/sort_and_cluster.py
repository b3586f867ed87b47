"""Reorder heads and channels so that those of like magnitude share a scale, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ssmc.core import Context, Graph, Pass, is_call, register
from ssmc.core.dialect import operands
from ssmc.errors import UsageError
from ssmc.passes._calibration import observe
from ssmc.passes.ssm_sites import Site
from ssmc.quant.clusters import sort_and_cluster
from ssmc.quant.observers import Absmax

_VIEWS = ("getitem", "split", "flatten", "unflatten", "to_dtype")


@register
@dataclass(frozen=True)
class SortAndCluster(Pass):
    """Sort the channels and heads of a Mamba-2 scan's input, and cluster those of like magnitude.

    Replaces:  out_proj(norm(scan(conv(x)), z)),  x, z, dt = in_proj(h)
    With:      the same, with channels in another order: rows of in_proj, conv, A, D, dt_bias, norm,
               columns of out_proj; and for quantise{granularity=tensor} a scale for each cluster
               of x, and for each SSD group of B and C, in place of one for all

    Quamba2 (Chiang et al. 2025, arXiv 2503.22879), section 4. Inside each SSD group channels are
    sorted in their heads, heads joined to `heads` clusters and channels cut into `channels` runs,
    so that an SSD group has heads * channels scales. The order is that of the largest magnitudes
    on calibration text. Clusters are those of least rounding error (`ssmc/quant/clusters.py`),
    found without random starts; the authors use Ward's method and k-means.
    Where every channel has a scale of its own, as with granularity=free, it changes nothing.
    """

    name = "sort-and-cluster"
    stage = "rewrite"
    needs = ("ssm-sites", "fold-a-log")
    exact_to = 1e-5
    heads: int = 4
    channels: int = 4

    def __post_init__(self) -> None:
        for option, value in self.options().items():
            if value < 1:
                raise UsageError(f"sort-and-cluster{{{option}={value}}}: {option} is at least 1")

    def run(self, g: Graph, context: Context) -> None:
        """Measure the scans' inputs, then reorder mixer by mixer."""
        mixers = [m for site in g.facts["ssm-sites"] if (m := self._mixer(g, site)) is not None]
        observers = {m.u: Absmax() for m in mixers}
        if mixers:
            observe(g, observers, context)
        for m in mixers:
            order, m.u.meta["clusters"] = self._cluster(observers[m.u].channel(), m)
            reorder(g, m, order)
            if m.groups > 1:
                for value in (m.B, m.C):
                    value.meta["clusters"] = _by_group(value)
            g.match(m.scan)

    def _cluster(self, maxima: Tensor, m: Mixer) -> tuple[Tensor, Tensor]:
        """Order and clusters [H, P] of all SSD groups together."""
        parts = maxima.cpu().view(m.groups, -1, m.width)
        found = [sort_and_cluster(part, self.heads, self.channels) for part in parts]
        orders = [order + i * parts[0].numel() for i, (order, _) in enumerate(found)]
        labels = [c + i * self.heads * self.channels for i, (_, c) in enumerate(found)]
        return torch.cat(orders).to(maxima.device), torch.cat(labels)

    def _mixer(self, g: Graph, site: Site) -> Mixer | None:
        try:
            return Mixer.of(site)
        except LookupError as error:
            g.skip(site.scan, str(error.args[0]))
            return None


@dataclass(frozen=True)
class Mixer:
    """What reordering the channels of a Mamba-2 mixer touches: calls, values, and where they are.

    `u_rows`, `z_rows`, `dt_rows` are the rows of in_proj that compute those, `u_conv` the channels
    of the convolution that compute u.
    """

    scan: fx.Node
    in_proj: fx.Node
    conv1d: fx.Node
    norm: fx.Node
    out_proj: fx.Node
    u: fx.Node
    B: fx.Node
    C: fx.Node
    u_rows: Tensor
    z_rows: Tensor
    dt_rows: Tensor
    u_conv: Tensor

    @property
    def groups(self) -> int:
        """SSD groups, each with B and C of its own."""
        return int(self.B.meta["val"].shape[-2])

    @property
    def width(self) -> int:
        """Channels of a head."""
        return int(self.u.meta["val"].shape[-1])

    @classmethod
    def of(cls, site: Site) -> Mixer:
        """The mixer around a scan; LookupError says why it cannot be reordered."""
        if not is_call(site.scan, "ssmc::ssd_scan"):
            raise LookupError("its scan has no heads: each channel has a step of its own")
        in_proj, conv1d, norm, out_proj = site.in_proj, site.conv1d, site.gate_norm, site.out_proj
        if not (in_proj and conv1d and norm and out_proj and site.x and site.z):
            raise LookupError("it has no in_proj, convolution, gated norm and out_proj around it")
        u_rows, z_rows, dt_rows = (origins(value, in_proj) for value in (site.u, site.z, site.dt))
        calls, values = (site.scan, in_proj, conv1d, norm, out_proj), (site.u, site.B, site.C)
        m = cls(*calls, *values, u_rows, z_rows, dt_rows, origins(site.u, site.x))
        _check_norm(m)
        _check_params(m)
        for value in (site.u, site.z, site.dt, norm):
            if len(value.users) > 1:
                raise LookupError(f"{value.name} has another reader")
        return m


def _check_norm(m: Mixer) -> None:
    """The norm reads the scan's channels in their order, and out_proj reads the norm."""
    x, size = operands(m.norm)["x"], operands(m.norm)["group_size"]
    in_order = origins(x, m.scan)
    if not torch.equal(in_order, torch.arange(in_order.numel())):
        raise LookupError(f"{x.name} reorders the scan's output")
    if operands(m.out_proj)["x"] is not m.norm:
        raise LookupError(f"{operands(m.out_proj)['x'].name} lies between its norm and out_proj")
    if size is not None and size % (in_order.numel() // m.groups):
        raise LookupError(f"its norm has groups of {size} channels, smaller than those of the scan")


def _check_params(m: Mixer) -> None:
    """What is reordered is a parameter, and its own."""
    for call in (m.in_proj, m.conv1d, m.scan, m.norm, m.out_proj):
        args = operands(call)
        for name in ("weight", "A", "D", "dt_bias") + ("bias",) * (call is not m.out_proj):
            param = args.get(name)
            if param is not None and (param.op != "get_attr" or len(param.users) > 1):
                raise LookupError(f"{param.name} is no parameter of its own")


def reorder(g: Graph, m: Mixer, order: Tensor) -> None:
    """Let place [h, p] of the scan's input hold what channel order[h, p] held, [H, P] int64."""
    flat, heads = order.flatten(), order[:, 0] // m.width
    whole = torch.arange(len(flat)), flat
    every_head = torch.arange(len(heads)), heads
    rows = (m.u_rows, flat), (m.z_rows, flat), (m.dt_rows, heads)
    _permute(g, m.in_proj, ("weight", "bias"), *rows)
    _permute(g, m.conv1d, ("weight", "bias"), (m.u_conv, flat))
    _permute(g, m.scan, ("A", "D", "dt_bias"), every_head)
    _permute(g, m.norm, ("weight",), whole)
    columns = operands(m.out_proj)["weight"]
    g.set_param(columns, g.param(columns)[:, flat].contiguous())


def _permute(
    g: Graph, call: fx.Node, names: tuple[str, ...], *moves: tuple[Tensor, Tensor]
) -> None:
    """Reorder the first dimension of a call's parameters: each set of places by its order."""
    for param in (operands(call)[name] for name in names):
        if param is None:
            continue
        value = g.param(param)
        rows = torch.arange(len(value), device=value.device)
        for places, order in moves:
            at = places.flatten().to(value.device)
            rows[at] = at[order]
        g.set_param(param, value[rows].contiguous())


def origins(value: fx.Node, origin: fx.Node) -> Tensor:
    """For each channel of `value`, the channel of `origin` that it is, or is convolved from.

    int64, of the shape of `value` beyond [batch, length]; where `origin` has several dimensions or
    results, its channels are those of the first, counted through. LookupError where anything but
    views and convolutions lies between.
    """
    found: Tensor = _origins(value, origin)[0, 0]
    return found.long()


def _origins(value: fx.Node, origin: fx.Node) -> Any:
    if value is origin:
        several = isinstance(value.meta["val"], tuple)
        shape = (value.meta["val"][0] if several else value.meta["val"]).shape[2:]
        channels = torch.arange(shape.numel()).view(1, 1, *shape)
        return (channels, None) if several else channels
    if is_call(value, "ssmc::causal_conv1d"):
        return _origins(operands(value)["x"], origin), None
    if not is_call(value, *_VIEWS):
        raise LookupError(f"{value.name} is not only views of {origin.name}")
    first, *rest = value.args
    return value.target(_origins(first, origin), *rest)  # type: ignore[arg-type, operator]


def _by_group(value: fx.Node) -> Tensor:
    """A cluster for each SSD group of B or C, [G, N]."""
    groups, rank = value.meta["val"].shape[-2:]
    return torch.arange(groups)[:, None].expand(groups, rank)
