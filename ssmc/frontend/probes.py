"""Telling modules by what they compute: run on the CPU with weights of the probe's own.

A module on the meta device is told as well, and a layer takes whatever width its weight has, so
that the probe of a wide one is as small as that of a narrow one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def probe(module: nn.Module, weights: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """What `module` computes with these weights in evaluation mode; None where it cannot."""
    try:
        return functional_call(_twin(module), dict(weights), args, kwargs)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None


def probe_as(
    forward: Callable[..., Any], module: nn.Module, weights: Mapping[str, Tensor], *args: Any
) -> Any:
    """What `forward(module, *args)` computes with these weights."""
    twin = _twin(module)
    twin.__dict__["forward"] = lambda *given: forward(twin, *given)
    return functional_call(twin, dict(weights), args)


def agree(found: Any, expected: Tensor) -> bool:
    """Whether two results of probes are the same but for rounding."""
    return (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    )


def draws() -> Callable[..., Tensor]:
    """Normal values of the shapes asked for, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)


def _twin(module: nn.Module) -> nn.Module:
    """A twin in evaluation mode that shares everything."""
    twin = copy.copy(module)
    twin.__dict__["training"] = False
    return twin
