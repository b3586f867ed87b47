"""What rules ask of a graph beyond the operands of a call: who uses a value, and how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ssmc.core import Graph, is_call
from ssmc.core.dialect import operands
from ssmc.core.pattern import Pattern, op

BITS = 8


# -- patterns ---------------------------------------------------------------------------------


def results_of(call: Pattern, count: int = 2) -> tuple[Pattern, ...]:
    """The first results of a call, each used once."""
    return tuple(op.getitem(call, i, sole_user=True) for i in range(count))


# -- users ------------------------------------------------------------------------------------


def only_user(value: fx.Node, name: str) -> fx.Node | None:
    """The one call that uses `value`, if it is a call of `name`."""
    users = list(value.users)
    return users[0] if len(users) == 1 and is_call(users[0], name) else None


def taken(call: fx.Node) -> dict[int, fx.Node]:
    """The results of `call` by index, as far as used; empty unless getitem takes each, once."""
    found = {user.args[1]: user for user in call.users if is_call(user, "getitem")}
    whole = len(found) == len(call.users) and all(isinstance(i, int) for i in found)
    return found if whole else {}  # type: ignore[return-value]


def segments(value: fx.Node) -> list[fx.Node]:
    """The runs of channels that `value` falls into: where a split alone uses it, all of them taken.

    Else `value` itself is the only one.
    """
    split = only_user(value, "split")
    sizes = segment_sizes(split)
    if split is None or sizes is None:
        return [value]
    parts = taken(split)
    return [parts[i] for i in range(len(sizes))] if len(parts) == len(sizes) else [value]


def segment_sizes(split: Any) -> list[int] | None:
    """The widths of the parts, if `split` splits the channels into parts given one by one."""
    if not is_call(split, "split"):
        return None
    value, sizes, dim = (*operands(split).values(), 0)[:3]
    last = dim in (-1, value.meta["val"].dim() - 1)
    return list(sizes) if last and isinstance(sizes, list | tuple) else None


def rounding(value: fx.Node) -> fx.Node | None:
    """The call that alone uses `value` and rounds it to int8 with a static scale per channel.

    Channels are all dimensions behind batch and length.
    """
    user = only_user(value, "ssmc::quantize")
    if user is None or operands(user)["bits"] != BITS:
        return None
    return user if is_static(operands(user)["scale"], value.meta["val"].shape[2:]) else None


def dynamic_rounding(value: fx.Node) -> fx.Node | None:
    """The call that alone uses `value` and rounds it to int8 with a scale per token."""
    user = only_user(value, "ssmc::quantize_dynamic")
    known = user is not None and operands(user)["bits"] == BITS and bool(taken(user))
    return user if known else None


def heads(value: fx.Node) -> tuple[fx.Node, tuple[int, ...]]:
    """`value`, or where it is only reshaped into groups of channels, that; and its channels."""
    shaped = only_user(value, "unflatten")
    if shaped is not None and shaped.args[1] in (-1, value.meta["val"].dim() - 1):
        value = shaped
    return value, tuple(value.meta["val"].shape[2:])


def same_shape(one: fx.Node, other: object) -> bool:
    """Whether `other` is a value, too, and of the same shape."""
    shape = one.meta["val"].shape
    return isinstance(other, fx.Node) and other.meta["val"].shape == shape


def is_model_state(g: Graph, value: Any) -> bool:
    """Whether `value` is a state that the graph is given and uses once: it may be overwritten."""
    names = {spec.name for spec in g.states}
    return isinstance(value, fx.Node) and value.name in names and len(value.users) == 1


# -- results ----------------------------------------------------------------------------------


def results(g: Graph, call: fx.Node, old: Sequence[fx.Node | None]) -> dict[fx.Node, fx.Node]:
    """The results of `call` in order, for the values `old` that they stand for (None: not used)."""
    with g.after(call):
        return {
            value: g.call("getitem", call, i, like=value)
            for i, value in enumerate(old)
            if value is not None
        }


# -- scales -----------------------------------------------------------------------------------


def is_static(scale: Any, channels: Sequence[int]) -> bool:
    """Whether `scale` is a parameter: one for all channels, or one for each."""
    if not isinstance(scale, fx.Node) or scale.op != "get_attr":
        return False
    return tuple(scale.meta["val"].shape) in ((), tuple(channels))


def full_scale(g: Graph, scale: fx.Node, channels: Sequence[int]) -> fx.Node:
    """`scale` with a value for each of the channels."""
    value = g.param(scale)
    if tuple(value.shape) == tuple(channels):
        return scale
    return g.new_param(str(scale.target), value.expand(tuple(channels)).contiguous())


def joined_scale(g: Graph, value: fx.Node, roundings: Sequence[fx.Node]) -> fx.Node:
    """One scale per channel of `value`, from those with which its segments are rounded."""
    scales = [operands(r)["scale"] for r in roundings]
    widths = [r.meta["val"].shape[-1] for r in roundings]
    if len(scales) == 1:
        return full_scale(g, scales[0], widths)
    parts = [g.param(s).expand(width) for s, width in zip(scales, widths, strict=True)]
    return g.new_param(f"scales.{value.name}", torch.cat(parts))


def same_scale(g: Graph, one: fx.Node, other: fx.Node) -> bool:
    """Whether two static scales agree, one value for all channels or one for each."""
    if one is other:
        return True
    a, b = torch.broadcast_tensors(g.param(one), g.param(other))
    return torch.equal(a, b)
