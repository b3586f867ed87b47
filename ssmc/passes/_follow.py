"""Values followed through a graph: what computes one, and what reads it."""

from __future__ import annotations

from torch import fx

from ssmc.core import is_call
from ssmc.core.dialect import operands

_VIEWS = ("getitem", "split", "flatten", "unflatten", "reshape", "to_dtype", "flip", "pad")
_CASTS = ("ssmc::quantize", "ssmc::quantize_dynamic", "ssmc::dequantize", "ssmc::hadamard")


def source(value: fx.Node) -> fx.Node:
    """The call that computes `value`, seen through views, casts and rotations."""
    while is_call(value, *_VIEWS, *_CASTS):
        value = next(iter(operands(value).values()))
    return value


def readers(value: fx.Node) -> list[fx.Node]:
    """The calls that read `value`, seen through views, casts and rotations."""
    found = []
    for user in value.users:
        found += readers(user) if is_call(user, *_VIEWS, *_CASTS) else [user]
    return found


def is_scaling(node: fx.Node) -> bool:
    """Whether a call multiplies by a number, which every linear map commutes with."""
    if is_call(node, "mul"):
        return len(node.all_input_nodes) == 1 and _numbers(node) == 1
    return is_call(node, "truediv") and isinstance(node.args[1], int | float)


def _numbers(node: fx.Node) -> int:
    return sum(isinstance(arg, int | float) for arg in node.args)


def base_of(value: fx.Node) -> tuple[fx.Node, float]:
    """What `value` is a multiple of by a number, and that number."""
    factor = 1.0
    while is_scaling(value):
        number = next(arg for arg in value.args if isinstance(arg, int | float))
        factor = factor * number if is_call(value, "mul") else factor / number
        value = value.all_input_nodes[0]
    return value, factor


def unscaled(node: fx.Node) -> fx.Node | None:
    """What a call multiplies by a number or, channel by channel, by a parameter; None for others.

    Models with multipliers (muP, Yang et al. 2022, arXiv 2203.03466, table 8) have both.
    """
    if is_scaling(node):
        return node.all_input_nodes[0]
    values = [operand for operand in node.all_input_nodes if operand.op != "get_attr"]
    if is_call(node, "mul") and len(values) == 1 < len(node.all_input_nodes):
        return values[0]
    return None


def computed_by(value: fx.Node) -> fx.Node:
    """The call that computes `value`, seen through views, casts, rotations and multiples."""
    found = source(value)
    while (inner := unscaled(found)) is not None:
        found = source(inner)
    return found


def read_by(value: fx.Node) -> list[fx.Node]:
    """The calls that read `value`, or a multiple of it by a number."""
    return [n for user in value.users for n in (read_by(user) if is_scaling(user) else [user])]
