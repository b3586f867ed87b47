"""Mixtures of experts are matched by what they compute, whatever the class is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssmc.frontend import experts, trace
from ssmc.frontend.adapters import adapter_of

from .models import build, error


def mixture() -> Any:
    model: Any = build("jamba")
    return model.model.layers[1].feed_forward


class Even(nn.Module):
    """Another author's: weights sum to one, other names for the parts."""

    def __init__(self) -> None:
        super().__init__()
        whole = mixture()
        self.gate, self.mlp = whole.router, whole.experts

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        _, weights, index = self.gate(flat)
        return self.mlp(flat, index, weights / weights.sum(-1, keepdim=True)).view(x.shape)


class Doubled(Even):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def shared_mixture() -> Any:
    model: Any = build("nemotron-experts")
    found = model.model.layers[2].mixer
    found.gate.e_score_correction_bias += torch.randn(4)  # changes who is chosen
    return found


class Unscaled(nn.Module):
    """The same parts, put together otherwise."""

    def __init__(self) -> None:
        super().__init__()
        whole = shared_mixture()
        self.gate, self.experts, self.mlp = whole.gate, whole.experts, whole.shared_experts

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        _, weights, index = self.gate(flat)
        return self.experts(flat, index, weights).view(x.shape) - self.mlp(x)


class Shared(Even):
    """One more expert that every token has."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shared(x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("make", "forward"),
    [
        (mixture, experts.mixture),
        (Even, experts.even_mixture),
        (shared_mixture, experts.shared_mixture),
        (Unscaled, None),
        (Doubled, None),
        (Shared, None),
        (lambda: mixture().experts, None),
    ],
)
def test_mixtures_are_told_apart(make: Any, forward: object, device: str) -> None:
    adapter = adapter_of(make().to(device))
    assert (adapter and adapter.forward) is forward


@pytest.mark.parametrize("make", [mixture, Even, shared_mixture])
def test_mixtures_compute_the_same(make: Any) -> None:
    module, x = make(), torch.randn(3, 7, 24)
    g = trace(module, x)
    assert len(g.calls("ssmc::expert_linear")) == 2
    with torch.no_grad():
        assert error(g(x)[0], module(x)) < 1e-5
