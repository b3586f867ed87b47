"""Linear layers, embeddings and norms, written with the operators.

Norms carry many class names and look alike while computing different things (some centre, some
add one to the weight), so a norm is matched by what it computes on a probe.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssmc import ops

_EPSILON = ("variance_epsilon", "eps", "epsilon")
_PROBE_WIDTH = 12  # of norms without a weight, which take any width


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a nn.Linear that computes what nn.Linear does."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def linear(module: Any, x: Tensor) -> Tensor:
    """nn.Linear as `ssmc::linear`."""
    return ops.linear(x, module.weight, module.bias)


def is_embedding(module: nn.Module) -> bool:
    """Whether `module` is a nn.Embedding that only looks up."""
    return (
        isinstance(module, nn.Embedding)
        and type(module).forward is nn.Embedding.forward
        and module.max_norm is None
    )


def embedding(module: Any, ids: Tensor) -> Tensor:
    """nn.Embedding as `ssmc::embedding`."""
    return ops.embedding(ids, module.weight)


def is_rms_norm(module: nn.Module) -> bool:
    """Whether `module` computes x / rms(x) * weight."""
    return _agrees(module, 1, lambda x, weight, eps: ops.rms_norm(x, weight, eps))


def rms_norm(module: Any, x: Tensor) -> Tensor:
    """A norm with a weight as `ssmc::rms_norm`."""
    return ops.rms_norm(x, module.weight, _epsilon(module))


def is_weightless_rms_norm(module: nn.Module) -> bool:
    """Whether `module` computes x / rms(x), whatever weight it may hold."""
    return _agrees(module, 1, lambda x, _, eps: ops.rms_norm(x, None, eps))


def weightless_rms_norm(module: Any, x: Tensor) -> Tensor:
    """A norm without a weight as `ssmc::rms_norm`."""
    return ops.rms_norm(x, None, _epsilon(module))


def is_gated_rms_norm(module: nn.Module) -> bool:
    """Whether `module` computes the output norm of Mamba-2 from (x, gate)."""

    def expected(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        return ops.rms_norm_gated(x, gate, weight, eps, *_gating(module))

    return _agrees(module, 2, expected)


def gated_rms_norm(module: Any, x: Tensor, gate: Tensor | None = None) -> Tensor:
    """A gated norm as `ssmc::rms_norm_gated`."""
    return ops.rms_norm_gated(x, gate, module.weight, _epsilon(module), *_gating(module))


def _gating(module: Any) -> tuple[int | None, bool]:
    size, groups = getattr(module, "group_size", None), getattr(module, "n_groups", None)
    if size is None and groups is not None:
        size = module.weight.shape[0] // groups
    return size, bool(getattr(module, "norm_before_gate", False))


def _epsilon(module: nn.Module) -> float:
    values = (getattr(module, name, None) for name in _EPSILON)
    return next((value for value in values if isinstance(value, float)), 0.0)


def _agrees(module: nn.Module, operands: int, expected: Callable[..., Tensor]) -> bool:
    """Whether `module` has a norm's structure and computes `expected` on a probe.

    The probe runs on the CPU with a weight of its own, so that a module on the meta device is
    told as well. One of its rows is small enough for epsilon to show.
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    if not _epsilon(module) or set(tensors) - {"weight"} or not _takes(module, operands):
        return False
    weight = tensors.get("weight")
    if weight is not None and weight.ndim != 1:
        return False
    generator = torch.Generator().manual_seed(0)
    width = _PROBE_WIDTH if weight is None else weight.shape[0]
    probe = torch.rand(width, generator=generator) + 0.5
    xs = [torch.randn(1, 2, width, generator=generator) for _ in range(operands)]
    xs[0][:, 1] *= 1e-3
    try:
        actual = torch.func.functional_call(module, {"weight": probe} if tensors else {}, tuple(xs))
    except (RuntimeError, TypeError, ValueError):
        return False  # it does not take what a norm takes
    target = expected(*xs, probe, _epsilon(module))
    return isinstance(actual, Tensor) and torch.allclose(actual, target, rtol=1e-4, atol=1e-6)


def _takes(module: nn.Module, operands: int) -> bool:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return sum(p.kind in positional for p in parameters) == operands
