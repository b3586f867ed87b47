"""Layers are matched by what they compute, whatever they are called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ssmc.frontend import layers, trace
from ssmc.frontend.adapters import adapter_of

from .models import error


class Plain(nn.Module):
    """T5's and Llama's."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))
        self.epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)


class AddsOne(Plain):
    """Gemma's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.weight) / self.weight


class Centres(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class EpsilonOutside(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.epsilon)


class Weightless(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)


class Gated(Plain):
    group_size = 4
    norm_before_gate = False

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        gate = torch.ones_like(x) if gate is None else nn.functional.silu(gate)
        x = x if self.norm_before_gate else x * gate
        groups = x.unflatten(-1, (-1, self.group_size))
        groups = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.epsilon)
        y = self.weight * groups.flatten(-2)
        return y * gate if self.norm_before_gate else y


class GatedAfter(Gated):
    norm_before_gate = True


class SaysOtherwise(GatedAfter):
    """Has the attributes of one norm and computes the other."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return Gated.forward(self, x * torch.sigmoid(gate), None)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("norm", "matched"),
    [
        (Plain, layers.rms_norm),
        (Weightless, layers.weightless_rms_norm),
        (Gated, layers.gated_rms_norm),
        (GatedAfter, layers.gated_rms_norm),
        (AddsOne, None),
        (Centres, None),
        (EpsilonOutside, None),
        (SaysOtherwise, None),
        (nn.LayerNorm, None),
        (nn.Identity, None),
    ],
)
def test_norms_are_told_apart(norm: type[nn.Module], matched: object, device: str) -> None:
    module = norm(12).to(device)
    adapter = adapter_of(module)
    assert (adapter and adapter.forward) is matched


@pytest.mark.parametrize("norm", [Plain, Weightless, Gated, GatedAfter])
def test_norms_compute_the_same(norm: type[nn.Module]) -> None:
    module = norm(12)
    inputs = [torch.randn(3, 5, 12) for _ in range(2 if isinstance(module, Gated) else 1)]
    graph = trace(module, inputs)
    assert sum(n.op == "call_function" for n in graph.nodes) == 1
    with torch.no_grad():
        assert error(graph(*inputs)[0], module(*inputs)) < 1e-6


def test_overridden_linear_and_renormalising_embedding_are_not_matched() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert adapter_of(Scaled(3, 3)) is None
    assert adapter_of(nn.Embedding(3, 3, max_norm=1.0)) is None
    scaled = Scaled(3, 3)
    x = torch.randn(2, 4, 3)
    with torch.no_grad():
        assert error(trace(scaled, x)(x)[0], scaled(x)) < 1e-6
