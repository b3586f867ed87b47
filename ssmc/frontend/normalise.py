"""The closed dialect out of what a module's code calls, and the checks on the finished graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ssmc.core import dialect
from ssmc.core.graph import BATCH, LENGTH, ROOM, is_call
from ssmc.errors import UnsupportedError
from ssmc.frontend.spellings import RULES, Call


def canonical(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What stands for a call of `target`, a function or the name of a method.

    Arguments are proxies and plain values; the result is a `Call`, a proxy or a plain value.
    Raises UnsupportedError for an operation outside the dialect.
    """
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = target.default
    if target in RULES:
        named = dict(kwargs)
        first = (named.pop("input"),) if "input" in named else ()  # torch's name for it
        return RULES[target](*first, *args, **named)
    if not dialect.is_legal(target) or _mutates(target):
        raise UnsupportedError(
            f"operator '{_spelled(target)}' is not in the dialect", hint=_remedy(target)
        )
    if isinstance(target, torch._ops.OpOverload):
        args, kwargs = _positional(target, args, kwargs)
    return Call(dialect.target_name(target), args, kwargs)


def _remedy(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload) and target.namespace not in ("aten", "prims"):
        return f"if it is functional, admit it with ssmc.allow_operators('{target.namespace}')"
    return "write it with ssmc.ops, or register an adapter for its module"


def _mutates(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _spelled(target: Any) -> str:
    return f"Tensor.{target}" if isinstance(target, str) else dialect.target_name(target)


def _positional(
    target: torch._ops.OpOverload[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An operator's arguments, positional and with defaults as far as the schema allows."""
    bound, rest = list(args), dict(kwargs)
    for argument in target._schema.arguments[len(args) :]:
        if argument.kwarg_only or not (argument.name in rest or argument.has_default_value()):
            break
        bound.append(rest.pop(argument.name, argument.default_value))
    return tuple(bound), rest


def fold_squeezes(graph: fx.Graph, tensors: dict[str, Tensor]) -> None:
    """Keep a parameter that is only read without its dimension of one, without it.

    The [C, 1, K] weight of a depthwise nn.Conv1d becomes the operators' [C, K].
    """
    for node in graph.find_nodes(op="get_attr"):
        users = list(node.users)
        dims = {user.args[1] for user in users if is_call(user, "squeeze")}
        if len(dims) != 1 or not all(is_call(user, "squeeze") for user in users):
            continue
        name = str(node.target)
        tensors[name] = tensors[name].squeeze(*dims)
        node.meta["val"] = tensors[name].to("meta")
        for user in users:
            user.replace_all_uses_with(node)
            graph.erase_node(user)


def check_extents(graph: fx.Graph) -> None:
    """Raise UnsupportedError, naming the node, where a dynamic extent became a number.

    The extents of the traced tensors are primes, so that a number baked into the graph shows:
    they divide it, or it is their sum.
    """
    for node in graph.nodes:
        baked = [n for n in _integers((node.args, node.kwargs)) if _is_marked(n)]
        if baked and node.op != "output":
            raise UnsupportedError(
                f"node '{node.name}' holds {baked[0]}, made of the batch size or the length",
                hint="take extents from x.shape where they are used, so that they stay dynamic",
            )


def _is_marked(value: int) -> bool:
    multiple = any(value % extent == 0 for extent in (BATCH, LENGTH, ROOM))
    return value != 0 and (multiple or value == BATCH + LENGTH)


def _integers(value: Any) -> Iterable[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, slice):
        yield from _integers((value.start, value.stop, value.step))
    elif isinstance(value, dict):
        yield from _integers(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _integers(part)
