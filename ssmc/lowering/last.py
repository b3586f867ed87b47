"""The result of the last position alone: what is computed for nothing else runs on one position."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ssmc.core import Graph
from ssmc.core.dialect import ELEMENTWISE, target_name
from ssmc.core.graph import LENGTH

ROWWISE = {
    f"ssmc::{name}"
    for name in (
        "add_rms_norm_quantize", "dequantize", "embedding", "expert_linear", "gated_norm_quantize",
        "hadamard", "hadamard_quantize", "int4_linear", "int8_embedding", "int8_expert_linear",
        "int8_expert_linear_sum", "int8_linear", "int8_linear_add", "int8_linear_quantize",
        "int8_linear_split", "layer_norm", "linear", "quantize", "quantize_dynamic", "rms_norm",
        "rms_norm_gated", "rms_norm_quantize", "silu_mul_quantize", "softmax_top_k", "top_k",
    )
}  # fmt: skip
"""Operators whose result at a position depends on that position of their operands alone."""

CHANNEL_VIEWS = {"split": (2,), "unflatten": (1,), "flatten": (1, 2)}
"""Reshapes, and which of their operands name dimensions."""

LAST = (slice(None), slice(-1, None))


def take_last(g: Graph) -> None:
    """Let `g` give its result for the last position only, [B, 1, ...]; states stay as they are.

    The selection moves up through calls that treat every position alike, as far as their results
    are used for nothing else: from there on everything runs on one position. What of the result has
    no length in its second dimension is left as it is. Values have to be inferred anew afterwards.
    """
    narrow = _narrow_calls(g)
    selected: dict[fx.Node, fx.Node] = {}

    def last(value: fx.Node) -> fx.Node:
        if value in narrow or not _has_positions(value):
            return value
        if value not in selected:
            with g.after(value):
                selected[value] = g.call("getitem", value, LAST, like=value, suffix="last")
        return selected[value]

    for node in g.nodes:
        if node in narrow:
            node.args = fx.map_arg(node.args, last)
    output = g.nodes[-1]
    output.args = ((fx.map_arg(g.result, last), g.new_states),)


def _narrow_calls(g: Graph) -> set[fx.Node]:
    """The calls that need to run on the last position only."""
    output, kept = g.nodes[-1], set(g.new_states)
    narrow: set[fx.Node] = {output}
    for node in reversed(g.nodes[:-1]):
        for_result = bool(node.users) and all(user in narrow for user in node.users)
        if for_result and node not in kept and _is_positionwise(node):
            narrow.add(node)
    for node in g.nodes:  # a tuple has no last position: it is the first value taken from it
        if any(_is_tuple(operand) and operand not in narrow for operand in node.all_input_nodes):
            narrow.discard(node)
    return narrow - {output}


def _is_positionwise(node: fx.Node) -> bool:
    if node.op != "call_function" or not _has_positions(node):
        return False
    name = target_name(node.target)
    if name in ROWWISE:
        return True
    if name in ELEMENTWISE:
        return all(_lines_up(operand, node) for operand in node.all_input_nodes)
    if name == "getitem":
        return isinstance(node.args[1], int) and _is_tuple(node.args[0])
    return name in CHANNEL_VIEWS and not node.kwargs and _reshapes_channels(node, name)


def _reshapes_channels(node: fx.Node, name: str) -> bool:
    rank = _value(node.args[0]).dim()
    dims = [node.args[i] for i in CHANNEL_VIEWS[name] if i < len(node.args)]
    given = len(dims) == len(CHANNEL_VIEWS[name])
    return given and all(isinstance(dim, int) and dim % rank >= 2 for dim in dims)


def _lines_up(operand: fx.Node, result: fx.Node) -> bool:
    """Whether an operand that broadcasts has its positions where the result has them."""
    value = _value(operand)
    if not isinstance(value, torch.Tensor) or LENGTH not in value.shape:
        return True
    return _has_positions(operand) and value.dim() == _value(result).dim()


def _has_positions(node: fx.Node) -> bool:
    """Whether the second dimension of a computed value, and no other, is the length."""
    value = _value(node)
    members = value if _is_tuple(node) else (value,)
    return node.op in ("call_function", "placeholder") and all(
        isinstance(v, torch.Tensor)
        and v.dim() >= 2
        and v.shape[1] == LENGTH
        and list(v.shape).count(LENGTH) == 1
        for v in members
    )


def _is_tuple(node: Any) -> bool:
    return isinstance(_value(node), tuple | list)


def _value(node: Any) -> Any:
    return node.meta["val"] if isinstance(node, fx.Node) else node
