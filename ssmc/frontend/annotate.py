"""Roles and names: what a traced graph says about itself before any pass runs."""

from __future__ import annotations

from ssmc.core import Context, Graph, is_call
from ssmc.core.dialect import operands
from ssmc.passes.linears import Linears
from ssmc.passes.ssm_sites import Site, SsmSites


def annotate(g: Graph) -> Graph:
    """Give calls their roles, and the parts of projections the names of what they are.

    `..._mixer_getitem_5` becomes `..._mixer_B`: x, z, u, dt, B, C as in the Mamba paper. The new
    value of state `l0_conv` is `l0_conv_next`.
    """
    for analysis in (SsmSites(), Linears()):
        analysis.run(g, Context())
    for site in g.facts["ssm-sites"]:
        _name_values(site)
    for spec, node in zip(g.states, g.new_states, strict=True):
        if is_call(node, "getitem", "ssmc::cache_append", "add"):
            node._rename(f"{spec.name}_next")
    g.facts.clear()
    g.matched.clear()
    return g


def _name_values(site: Site) -> None:
    owner = str(site.scan.meta["owner"]).replace(".", "_")
    for name, node in site.values().items():
        if is_call(node, "getitem", "unflatten"):
            node._rename(f"{owner}_{name}".lstrip("_"))
    low = operands(site.dt_proj)["x"] if site.dt_proj is not None else None
    if low is not None and is_call(low, "getitem"):
        low._rename(f"{owner}_dt_low".lstrip("_"))
