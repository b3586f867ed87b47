"""The closed set of operators a graph may hold, each under one name.

A graph holds `ssmc::` operators, tensor functions of the table below, and operators registered
with torch.library in a namespace that was admitted by `allow_operators`. Closing the set is what
makes a graph on disk safe: a node names its target, and only a name found here is resolved.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F

import ssmc.ops  # registers the ssmc:: operators
from ssmc.errors import UnsupportedError, did_you_mean


def to_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in another dtype."""
    return x.to(dtype)


def size(x: torch.Tensor, dim: int) -> int:
    """The extent of one dimension of `x`."""
    return x.shape[dim]


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": torch.abs,
    "add": operator.add,
    "cat": torch.cat,
    "clamp": torch.clamp,
    "cos": torch.cos,
    "exp": torch.exp,
    "flatten": torch.flatten,
    "flip": torch.flip,
    "floordiv": operator.floordiv,
    "gather": torch.gather,
    "gelu": F.gelu,
    "getitem": operator.getitem,
    "log": torch.log,
    "matmul": torch.matmul,
    "mean": torch.mean,
    "mul": operator.mul,
    "neg": operator.neg,
    "pad": F.pad,
    "permute": torch.permute,
    "pow": torch.pow,
    "relu": F.relu,
    "reshape": torch.reshape,
    "rsqrt": torch.rsqrt,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sin": torch.sin,
    "size": size,
    "softmax": torch.softmax,
    "softplus": F.softplus,
    "split": torch.split,
    "sqrt": torch.sqrt,
    "squeeze": torch.squeeze,
    "stack": torch.stack,
    "sub": operator.sub,
    "sum": torch.sum,
    "tanh": torch.tanh,
    "to_dtype": to_dtype,
    "transpose": torch.transpose,
    "truediv": operator.truediv,
    "unflatten": torch.unflatten,
    "unsqueeze": torch.unsqueeze,
}
ELEMENTWISE = {
    "abs", "add", "clamp", "cos", "exp", "gelu", "log", "mul", "neg", "pow", "relu", "rsqrt",
    "sigmoid", "silu", "sin", "softplus", "sqrt", "sub", "tanh", "to_dtype", "truediv",
}  # fmt: skip
"""Functions of single elements, of operands that broadcast."""

_NAMES = {function: name for name, function in FUNCTIONS.items()}
_namespaces = {"ssmc"}


def allow_operators(namespace: str) -> None:
    """Admit the operators of a torch.library namespace to graphs, traced and read from disk."""
    _namespaces.add(namespace)


def target_name(target: Any) -> str:
    """The name of a node's target: `ssmc::linear`, `add`, `mylib::op.variant`."""
    if isinstance(target, torch._ops.OpOverload):
        name, _, overload = target.name().partition(".")
        return name if overload in ("", "default") else f"{name}.{overload}"
    return _NAMES.get(target) or str(getattr(target, "__name__", target))


def is_legal(target: Any) -> bool:
    """Whether a call_function target may stand in a graph."""
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace in _namespaces
    return target in _NAMES


def resolve(name: str) -> Callable[..., Any]:
    """The function behind a target name; raises UnsupportedError for a name outside the dialect."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    namespace, _, op = name.partition("::")
    op, _, overload = op.partition(".")
    packet = getattr(getattr(torch.ops, namespace), op, None) if namespace in _namespaces else None
    found = getattr(packet, overload or "default", None)
    if not isinstance(found, torch._ops.OpOverload):
        raise UnsupportedError(
            f"operator '{name}' is not in the dialect",
            hint=did_you_mean(name, known_names())
            or f"import what registers it and call ssmc.allow_operators('{namespace}')",
        )
    return found


def known_names() -> list[str]:
    """Every name of the table and of the ssmc:: operators."""
    return sorted([*FUNCTIONS, *(f"ssmc::{name}" for name in ssmc.ops.__all__)])


def operands(node: torch.fx.Node) -> dict[str, Any]:
    """A call's operands by schema name, defaults filled in; by position for table functions."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {**{str(i): arg for i, arg in enumerate(node.args)}, **node.kwargs}
    schema = node.target._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in schema}
