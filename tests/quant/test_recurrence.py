"""The recurrence with rounded states: its values, and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmc.quant.recurrence import PART, rounded_recurrence
from ssmc.quant.state import round_state_tensor

LENGTH = 2 * PART + 3


def operands(kind: str) -> tuple[Tensor, ...]:
    """dt, x, A, B, C in float64: A of a channel and a place, or of a head."""
    heads, P, N = (1, 4, 5) if kind == "channels" else (2, 3, 5)
    shape = (P, N) if kind == "channels" else (1, 1)
    dt = torch.rand(2, LENGTH, heads, shape[0]).double()
    x, B, C = (torch.randn(2, LENGTH, heads, n).double() for n in (P, N, N))
    return dt, x, -torch.rand(heads, *shape).double(), B, C


def rounding(h: Tensor, t: int) -> Tensor:
    return round_state_tensor(h.float(), 4, "decoupled", 5).double()


def by_autograd(dt: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The definition, with the rounding's error as a constant."""
    h, y = torch.zeros(*x.shape[:1], *x.shape[2:], B.shape[-1], dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = (dt[:, t, ..., None] * A).exp() * h + x[:, t, ..., None] * B[:, t, :, None]
        y.append((h * C[:, t, :, None]).sum(-1))
        h = h + (rounding(h, t) - h).detach()
    return torch.stack(y, 1)


@pytest.mark.parametrize("kind", ["channels", "heads"])
def test_values_and_gradients_are_those_of_the_definition(kind: str) -> None:
    dt, x, A, B, C = operands(kind)
    leaves = [v.requires_grad_() for v in (dt, x, B, C)]
    y = rounded_recurrence(dt, x, A, B, C, rounding)
    expected = by_autograd(dt, x, A, B, C)
    assert torch.allclose(y, expected, rtol=1e-12)
    weight = torch.randn_like(y)
    for got, wanted in zip(
        torch.autograd.grad(y, leaves, weight),
        torch.autograd.grad(expected, leaves, weight),
        strict=True,
    ):
        assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["channels", "heads"])
def test_rounding_is_told_the_step_and_makes_a_difference(kind: str) -> None:
    steps = []

    def store(h: Tensor, t: int) -> Tensor:
        steps.append(t)
        return h

    given = operands(kind)
    exact = rounded_recurrence(*given, store)
    assert steps == list(range(LENGTH))
    rounded = rounded_recurrence(*given, rounding)
    assert torch.equal(rounded[:, 0], exact[:, 0])  # the first output is that of a fresh state
    assert (rounded - exact)[:, 1:].abs().max() > 1e-3
