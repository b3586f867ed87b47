"""Analysis: where the state-space models of a graph are, found by following values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ssmc.core import Context, Graph, Pass, is_call, register
from ssmc.core.dialect import operands
from ssmc.passes._follow import computed_by, readers, source

SCANS = ("ssmc::selective_scan", "ssmc::ssd_scan")
ACTIVATIONS = ("silu", "gelu", "relu", "sigmoid")
NORMS = ("ssmc::layer_norm", "ssmc::rms_norm", "ssmc::rms_norm_gated")


@dataclass(frozen=True)
class Site:
    """One selective scan (Mamba-1) or SSD scan (Mamba-2) and what surrounds it.

    `x` is the input of the convolution; `u`, `dt`, `B`, `C` are the scan's operands (`u` is
    the SSM input), `z` the gate wherever it is applied, `y` the input of out_proj. What a model
    does not have is None.
    """

    scan: fx.Node
    u: fx.Node
    dt: fx.Node
    B: fx.Node
    C: fx.Node
    z: fx.Node | None = None
    x: fx.Node | None = None
    y: fx.Node | None = None
    conv1d: fx.Node | None = None
    in_proj: fx.Node | None = None
    x_proj: fx.Node | None = None
    dt_proj: fx.Node | None = None
    gate_norm: fx.Node | None = None
    out_proj: fx.Node | None = None

    def parts(self) -> dict[str, fx.Node]:
        """The calls of the site by role."""
        roles = ("scan", "conv1d", "in_proj", "x_proj", "dt_proj", "gate_norm", "out_proj")
        return {role: getattr(self, role) for role in roles if getattr(self, role) is not None}

    def values(self) -> dict[str, fx.Node]:
        """The activations of the site by name."""
        names = ("x", "z", "u", "dt", "B", "C", "y")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@register
@dataclass(frozen=True)
class SsmSites(Pass):
    """Find the SSM inputs, outputs and projections; give each call its role.

    Replaces:  nothing
    With:      roles (in_proj, conv1d, x_proj, dt_proj, scan, gate_norm, out_proj) and the list
               of sites, which other passes ask for
    """

    name = "ssm-sites"
    stage = "analyse"

    def run(self, g: Graph, context: Context) -> None:
        """Follow the operands of every scan up and its output down."""
        sites = [find_site(n) for n in g.nodes if is_call(n, *SCANS)]
        for site in sites:
            for role, node in site.parts().items():
                node.meta["role"] = role
            g.match(site.scan)
        g.facts[self.name] = sites


def find_site(scan: fx.Node) -> Site:
    """The site around one scan."""
    args = operands(scan)
    u = args.get("u") or args["x"]
    conv1d = _only(computed_by(u), "ssmc::causal_conv1d")
    x = operands(conv1d)["x"] if conv1d is not None else None
    dt_source = _only(computed_by(args["dt"]), "ssmc::linear")
    below = _only(_normed_source(operands(dt_source)["x"]), "ssmc::linear") if dt_source else None
    gate_norm, out_proj = _down(scan)
    gate = operands(gate_norm)["gate"] if gate_norm is not None else _factor(out_proj)
    return Site(
        scan=scan,
        u=u,
        dt=args["dt"],
        B=args["B"],
        C=args["C"],
        z=args.get("z") or gate,
        x=x,
        y=operands(out_proj)["x"] if out_proj is not None else None,
        conv1d=conv1d,
        in_proj=_only(computed_by(x), "ssmc::linear") if x is not None else None,
        x_proj=below
        if below is not None and computed_by(args["B"]) in (below, *_normed(below))
        else None,
        dt_proj=dt_source if below is not None else None,
        gate_norm=gate_norm,
        out_proj=out_proj,
    )


def _normed_source(value: fx.Node) -> fx.Node:
    """The call that computes `value`, seen through a norm and multiples as well."""
    found = computed_by(value)
    return computed_by(operands(found)["x"]) if is_call(found, *NORMS) else found


def _normed(node: fx.Node) -> list[fx.Node]:
    return [n for n in readers(node) if is_call(n, *NORMS)]


def _only(node: fx.Node, name: str) -> fx.Node | None:
    return node if is_call(node, name) else None


def _summed(found: list[fx.Node]) -> list[fx.Node]:
    """`found`, and what reads the sums of scans among them: of the two directions, say."""
    sums = (n for n in found if is_call(n, "add") and len(n.all_input_nodes) == 2)
    scanned = (n for n in sums if all(is_call(source(x), *SCANS) for x in n.all_input_nodes))
    return found + [reader for n in scanned for reader in readers(n)]


def _factor(out_proj: fx.Node | None) -> fx.Node | None:
    """The gate of a product that out_proj reads: what the activation in it activates."""
    product = source(operands(out_proj)["x"]) if out_proj is not None else None
    factors = product.all_input_nodes if is_call(product, "mul") else []  # type: ignore[union-attr]
    return next((n.all_input_nodes[0] for n in factors if is_call(n, *ACTIVATIONS)), None)


def _down(scan: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    output = next((n for n in scan.users if is_call(n, "getitem") and n.args[1] == 0), scan)
    found = _summed(readers(output))
    gate_norm = next((n for n in found if is_call(n, "ssmc::rms_norm_gated")), None)
    if gate_norm is not None:
        found = readers(gate_norm)
    else:  # a gate without a norm is a product
        found += [n for gated in found if is_call(gated, "mul") for n in readers(gated)]
    return gate_norm, next((n for n in found if is_call(n, "ssmc::linear")), None)
