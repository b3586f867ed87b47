"""The parameters of a block by which its scans select: what gives B, C and dt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ssmc.core import Graph, is_call
from ssmc.core.dialect import operands
from ssmc.passes._rows import rows_behind
from ssmc.passes.ssm_sites import NORMS, SCANS, Site


def selective_params(
    g: Graph, calls: Sequence[fx.Node], sites: Sequence[Site]
) -> dict[fx.Node, Tensor]:
    """The parameters to be trained among those that `calls` read, each with a mask of its shape.

    They are weights and biases of the norms, of the convolutions and projections that B, C and dt
    come through, and the bias of dt. The mask is 0 for the rows of a projection that give x or z,
    else 1. What other calls read, too, is left out.
    """
    known, found = set(calls), {}
    frozen = [rows_behind(v) for site in sites for v in (site.u, site.z) if v is not None]
    for node in _upstream(calls, sites):
        for param in _params(node):
            mask = torch.ones_like(g.param(param))
            for rows in (r for r in frozen if r is not None and r.linear is node):
                mask[rows.start : rows.stop] = 0
            if mask.any() and known.issuperset(param.users):
                found[param] = mask
    return found


def _upstream(calls: Sequence[fx.Node], sites: Sequence[Site]) -> list[fx.Node]:
    """The calls that B, C and dt come through, the scans, and every norm."""
    seen = {site.scan for site in sites}
    left = [value for site in sites for value in (site.B, site.C, site.dt)]
    while left:
        node = left.pop()
        if node in calls and node not in seen:
            seen.add(node)
            left += node.all_input_nodes
    return [n for n in calls if n in seen or is_call(n, *NORMS)]


def _params(node: fx.Node) -> list[fx.Node]:
    """The parameters of a call that are trained."""
    names = ("dt_bias",) if is_call(node, *SCANS) else ("weight", "bias")
    given = (operands(node).get(name) for name in names)
    return [v for v in given if isinstance(v, fx.Node) and v.op == "get_attr"]
