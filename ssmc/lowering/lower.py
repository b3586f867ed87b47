"""Lower a quantised graph: fuse what the rules match, then take a backend's kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx

from ssmc.core import Graph, is_call
from ssmc.core.dialect import target_name
from ssmc.errors import UsageError, choices
from ssmc.lowering.backends import BACKENDS, Backend
from ssmc.lowering.last import take_last
from ssmc.lowering.patterns import HEAVY, RULES
from ssmc.lowering.rewriter import VIEWS, Rewriter

Form = Literal["sequence", "last", "step"]
"""`sequence`: any length, the result of every position. `last`: any length, the result [B, 1, ...]
of the last position. `step`: one position; the states given may be overwritten."""


@dataclass
class Lowered:
    """A graph that really runs in integers: each value keeps the name it had when simulated.

    `fused` names the calls that lowering put in. `kept` says of each heavy call left in float why,
    and of a backend with kernels for everything also which calls run as plain torch.
    """

    graph: Graph
    backend: Backend
    form: Form = "sequence"
    fused: list[str] = field(default_factory=list)
    kept: list[dict[str, str]] = field(default_factory=list)


def lower(g: Graph, backend: str | Backend = "cpu", form: Form = "sequence") -> Lowered:
    """The lowered twin of `g` for `backend`, in one of its forms; `g` stays as it is.

    Raises UsageError for a backend that is not known, DeviceError for one that cannot run here.
    """
    chosen = find_backend(backend) if isinstance(backend, str) else backend
    kernels = chosen.load()
    twin = g.copy()
    rewriter = Rewriter(twin)
    for rules in (RULES, *(chosen.step_rules if form == "step" else chosen.rules)):
        rewriter.apply(rules)
    if form == "last":
        take_last(twin)
    twin.finish()
    _explain(twin, chosen, kernels)
    fused = [node.name for node in twin.nodes if node in rewriter.fused]
    _take_kernels(twin, kernels)
    return Lowered(twin, chosen, form, fused, twin.skipped)


def find_backend(name: str) -> Backend:
    """The backend called `name`; UsageError where there is none."""
    if name not in BACKENDS:
        raise UsageError(f"unknown backend '{name}'", hint=choices(name, BACKENDS))
    return BACKENDS[name]


def _explain(g: Graph, backend: Backend, kernels: Mapping[str, Callable[..., Any]]) -> None:
    explained = {entry["node"] for entry in g.skipped}
    for node in g.nodes:
        if node.op != "call_function" or node.name in explained:
            continue
        if is_call(node, *HEAVY):
            g.skip(node, "its operands are not quantised, or not in a way it can fuse")
        elif backend.complete and _launches(node) and not is_call(node, *kernels):
            g.skip(node, f"plain torch: there is no kernel for {target_name(node.target)}")


def _launches(node: fx.Node) -> bool:
    """Whether a call computes tensors."""
    return not is_call(node, *VIEWS) and not isinstance(node.meta["val"], int)


def _take_kernels(g: Graph, kernels: Mapping[str, Callable[..., Any]]) -> None:
    for node in g.nodes:
        if node.op == "call_function":
            node.target = kernels.get(target_name(node.target), node.target)
    g.module.recompile()
