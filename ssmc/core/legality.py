"""What a graph must satisfy after every pass."""

from __future__ import annotations

from collections.abc import Container

from torch import fx

from ssmc.core.dialect import is_legal, target_name
from ssmc.core.graph import Graph, check_finite
from ssmc.errors import PassError

_QUANTISED = (
    "ssmc::quantize",
    "ssmc::quantize_dynamic",
    "ssmc::quantize_state",
    "ssmc::dequantize",
    "ssmc::dequantize_state",
    "ssmc::dequantize_groups",
)


def check_graph(g: Graph, stage: str) -> None:
    """Raise PassError naming the first node that is not well formed or not legal in `stage`."""
    g.module.graph.lint()
    for node in g.nodes:
        problem = _problem(node, stage)
        if problem:
            raise PassError(f"after a pass of stage {stage}, node '{node.name}' {problem}")


def _problem(node: fx.Node, stage: str) -> str | None:
    if node.op in ("call_module", "call_method"):
        return f"is a {node.op}; the dialect is functional (call_function with get_attr operands)"
    if node.op == "output":
        return None
    if "val" not in node.meta:
        return "has no inferred value; create calls with Graph.call"
    if node.op == "call_function" and not is_legal(node.target):
        return f"calls {target_name(node.target)}, which is not in the dialect"
    if (
        stage != "quantise"
        and node.op == "call_function"
        and target_name(node.target) in _QUANTISED
    ):
        return "quantises before the quantise stage"
    return None


def check_tensors(g: Graph, names: Container[str] | None = None) -> None:
    """Raise NumericsError naming the first parameter (of those named) with NaN or infinity."""
    for node in g.nodes:
        if node.op != "get_attr" or (names is not None and node.target not in names):
            continue
        if g.param(node).device.type != "meta":
            check_finite(node, g.param(node))
