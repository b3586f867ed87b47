"""A graph as text: one line a call, parameters by name, dynamic extents as b, l and r."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ssmc.core.dialect import operands, target_name
from ssmc.core.graph import BATCH, LENGTH, ROOM, Graph

_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
}
_EXTENTS = {BATCH: "b", LENGTH: "l", ROOM: "r"}


def graph_text(g: Graph, layer: int | None = None) -> str:
    """Every call of `g`, or of one layer, a line each."""
    return "\n".join(graph_lines(g, layer).values())


def graph_lines(g: Graph, layer: int | None = None) -> dict[str, str]:
    """The line of every call by node name; getitem and parameters stand inside other lines."""
    shown = (n for n in g.nodes if n.op in ("call_function", "placeholder", "output"))
    return {n.name: node_line(n) for n in shown if layer is None or n.meta.get("layer") == layer}


def node_line(node: fx.Node) -> str:
    """`%conv = ssmc::causal_conv1d(%x, conv1d.weight)   f32[b,l,512]   conv1d`."""
    if node.op == "placeholder":
        return f"%{node.name} = input   {value_text(node.meta.get('val'))}"
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    inside = ", ".join(_argument(value) for value in _shown_operands(node))
    role = f"   {node.meta['role']}" if node.meta.get("role") else ""
    call = f"%{node.name} = {target_name(node.target)}({inside})"
    return f"{call}   {value_text(node.meta.get('val'))}{role}"


def _shown_operands(node: fx.Node) -> list[Any]:
    values = list(operands(node).values())
    while values and values[-1] is None:
        values.pop()
    return values


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return str(value.target) if value.op == "get_attr" else f"%{value.name}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument(v) for v in value)}]"
    return str(value).removeprefix("torch.")


def value_text(value: Any) -> str:
    """`f32[b,l,512]` for a tensor; a tuple's members in parentheses."""
    if isinstance(value, torch.Tensor):
        extents = ",".join(_EXTENTS.get(n, str(n)) for n in value.shape)
        return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{extents}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(value_text(v) for v in value)})"
    return type(value).__name__
