"""How an operator is declared: one function is its schema, its reference and its public name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ssmc.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")

LIBRARY = torch.library.Library("ssmc", "FRAGMENT")
FLOAT32_MAX = torch.finfo(torch.float32).max


def operator(fake: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated reference as `ssmc::<its name>`, on every device.

    `fake` takes the same arguments and returns empty tensors of the result's shapes; it serves
    the meta device and FakeTensor. What the decorator returns is the public wrapper. It calls
    the overload with every argument positional and every default filled in, so that a call
    traced with torch.fx proxies is a node whose arguments are at fixed indices.
    """

    def declare(reference: Callable[P, R]) -> Callable[P, R]:
        name = reference.__name__
        # Not torch.library.custom_op: that imports the compiler (2 s) at the first call, and
        # triples the cost of the calls after it.
        LIBRARY.define(name + _schema(reference), tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        # Gradients are those of the torch operators that the reference consists of.
        LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"ssmc::{name}", fake, lib=LIBRARY)
        return _wrapper(reference, getattr(torch.ops.ssmc, name).default)

    return declare


def composite(reference: Callable[P, R]) -> Callable[P, R]:
    """Register a composition of operators, which have fakes of their own, as one operator."""
    return operator(reference)(reference)


def _schema(reference: Callable[..., Any]) -> str:
    # The schema language cannot spell infinity; for a float32 the largest one is as good a bound.
    schema = torch.library.infer_schema(reference, mutates_args=())
    return schema.replace("=inf", f"={FLOAT32_MAX!r}")


def _wrapper(reference: Callable[P, R], overload: Callable[..., R]) -> Callable[P, R]:
    signature = inspect.signature(reference)

    @functools.wraps(reference)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return overload(*bound.args)

    return call


def expect_shape(
    op: str, operand: str, tensor: Tensor | None, shape: Sequence[int | torch.SymInt]
) -> None:
    """Raise UsageError, naming operator and operand, unless `tensor` is None or of `shape`."""
    if tensor is None or tuple(tensor.shape) == tuple(shape):
        return
    raise UsageError(
        f"ssmc::{op}: {operand} has shape {list(tensor.shape)}, expected {list(shape)}",
        hint="layouts are [batch, length, channels]; a depthwise weight is [channels, taps]",
    )
