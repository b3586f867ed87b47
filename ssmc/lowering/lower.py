"""Lower a quantised graph: fuse what the patterns match, then take a backend's kernels."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from ssmc.core import Graph, is_call
from ssmc.core.dialect import target_name
from ssmc.errors import UsageError, choices
from ssmc.lowering.backends import BACKENDS, Backend
from ssmc.lowering.patterns import HEAVY, RULES


@dataclass
class Lowered:
    """A graph that really runs in integers: each call keeps the name it had when simulated.

    `fused` names the calls lowered; `kept` says of each heavy call left in float why.
    """

    graph: Graph
    backend: Backend
    fused: list[str] = field(default_factory=list)
    kept: list[dict[str, str]] = field(default_factory=list)


def lower(g: Graph, backend: str = "cpu") -> Lowered:
    """The lowered twin of `g` for `backend`; `g` stays as it is. UsageError if it is unknown."""
    if backend not in BACKENDS:
        raise UsageError(
            f"unknown backend '{backend}'",
            hint=choices(backend, BACKENDS),
        )
    twin = g.copy()
    lowered = Lowered(twin, BACKENDS[backend], twin.matched, twin.skipped)
    for node in twin.nodes:
        _fuse(twin, node)
    twin.finish()
    _explain(lowered)
    _take_kernels(lowered)
    return lowered


def _fuse(g: Graph, node: fx.Node) -> None:
    for pattern, rewrite in RULES:
        match = pattern.match(node)
        if match is None:
            continue
        with g.before(node):
            fused = rewrite(g, match)
        if fused is not None:
            fused.meta["role"] = node.meta.get("role")
            name = node.name
            g.replace(node, fused)
            fused.name = name
            g.match(fused)
        return


def _explain(lowered: Lowered) -> None:
    explained = {entry["node"] for entry in lowered.kept}
    for node in lowered.graph.nodes:
        if is_call(node, *HEAVY) and node.name not in explained:
            lowered.graph.skip(node, "its operands are not quantised, or not in a way it can fuse")


def _take_kernels(lowered: Lowered) -> None:
    for node in lowered.graph.nodes:
        if node.op == "call_function":
            node.target = lowered.backend.kernels.get(target_name(node.target), node.target)
    lowered.graph.module.recompile()
