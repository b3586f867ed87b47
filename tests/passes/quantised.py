"""Reading a quantised graph."""

from __future__ import annotations

from typing import Any

import torch
from core.tiny import context, error

from ssmc.core import Graph, is_call


def form(g: Graph, value: Any) -> str:
    """How an operand is quantised: float, token, or int8 or static with the scale's shape."""
    if value is None:
        return "none"
    if not is_call(value, "ssmc::dequantize"):
        return "float"
    integers, scale = value.args
    if scale.op != "get_attr":
        assert is_call(scale.args[0], "ssmc::quantize_dynamic")
        assert integers.args[0] is scale.args[0]
        return "token"
    kind = "int8" if integers.op == "get_attr" else "static"
    return f"{kind}{list(g.param(scale).shape)}"


def raw_value(value: Any) -> torch.fx.Node:
    """The float value behind a quantised activation."""
    integers = value.args[0]
    pair = integers.args[0] if is_call(integers, "getitem") else integers
    raw: torch.fx.Node = pair.args[0]
    return raw


def watched(g: Graph, *nodes: Any) -> list[torch.Tensor]:
    """The values of nodes on the probe."""
    seen: dict[torch.fx.Node, Any] = {}
    g.watch(lambda node, value: seen.update({node: value}), *(context().probe or ()))
    return [seen[node] for node in nodes]


def input_error(g: Graph, linear: torch.fx.Node) -> float:
    """The relative error of a layer's output that comes from rounding its input."""
    x, weight = linear.args[:2]
    raw, rounded, w = watched(g, raw_value(x), x, weight)
    return error(rounded @ w.T, raw @ w.T)
