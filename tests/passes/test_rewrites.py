"""Exact rewrites that move tensors: fold-norm and fold-a-log."""

from __future__ import annotations

import pytest
import torch
from core.tiny import KINDS, apply, error, graph, logits, toy_context
from torch import Tensor, nn

from ssmc import ops
from ssmc.core import Context
from ssmc.core.dialect import operands
from ssmc.frontend import trace


@pytest.mark.parametrize("kind", KINDS)
def test_fold_norm(kind: str) -> None:
    g = graph(kind)
    before, expected, params = len(g.calls("ssmc::rms_norm")), logits(g), g.params()
    record = apply(g, "fold-norm")["fold-norm"]
    norms = g.calls("ssmc::rms_norm")
    tied = kind == "mamba"
    assert len(norms) == before == 3
    assert [operands(n)["weight"] is None for n in norms] == [True, True, not tied]
    for i in range(2):
        name = f"backbone.layers.{i}.mixer.in_proj.weight"
        gamma = params[f"backbone.layers.{i}.norm.weight"]
        assert torch.equal(g.params()[name], params[name] * gamma)
        assert f"backbone.layers.{i}.norm.weight" not in g.params()
    assert error(logits(g), expected) < 1e-6
    assert record.error is not None
    assert 0 < record.error < 1e-6
    assert len(record.matched) == 3 - tied
    reason = "the weight of lm_head is tied: backbone.embeddings.weight"
    assert record.skipped == tied * [{"node": "backbone_norm_f", "reason": reason}]


class Norms(nn.Module):
    """Norms that cannot be folded, each for a reason, and one that can; two share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.offset = (nn.Parameter(torch.rand(6) + 0.5) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.layers
        x = x + a(ops.rms_norm(x, 1 + self.offset))
        y = ops.rms_norm(x, self.gamma)
        x = x + b(y) * y
        x = x + ops.linear(ops.rms_norm(x, self.gamma), c.weight * 2.0, c.bias)
        return x + d(ops.rms_norm(x, self.gamma))


def test_fold_norm_says_what_it_leaves() -> None:
    g = trace(Norms(), torch.zeros(2, 5, 6))
    (x,) = toy_context().batches().__next__()
    expected = g(x)[0]
    record = apply(g, "fold-norm", toy_context())["fold-norm"]
    assert [s["reason"] for s in record.skipped] == [
        "its weight is computed, by add",
        "mul, which reads it, is no linear layer",
        "the weight of linear is computed, by mul_1",
    ]
    assert len(record.matched) == 1
    assert error(g(x)[0], expected) < 1e-6


class LayerNorms(nn.Module):
    """LayerNorms with biases: two that can be folded, and three that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(5))
        for norm in self.norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=i != 1) for i in range(5))
        self.layers[4].bias = self.layers[3].bias

    def forward(self, x: Tensor) -> Tensor:
        for i, factor in enumerate((1, 1, 0.5, 1, 1)):
            y = self.norms[i](x)
            x = x + self.layers[i](y if factor == 1 else y * factor)
        return x


def test_fold_norm_moves_the_bias_of_a_layer_norm() -> None:
    module = LayerNorms()
    g = trace(module, torch.zeros(2, 5, 6))
    (x,) = toy_context().batches().__next__()
    expected = g(x)[0]
    record = apply(g, "fold-norm", toy_context())["fold-norm"]
    assert len(record.matched) == 2
    assert [s["reason"].partition(" ")[2] for s in record.skipped] == [
        "reads a multiple of it or has no bias, so its own bias has no place",
        *(f"bias of layers_{i} is computed or tied" for i in (3, 4)),
    ]
    assert error(g(x)[0], expected) < 1e-6
    given = module.layers[1].weight @ module.norms[1].bias
    assert torch.equal(g.params()["layers.1.bias"], given)


@pytest.mark.parametrize("kind", KINDS)
def test_fold_a_log(kind: str) -> None:
    g = graph(kind)
    expected, params = logits(g), g.params()
    assert len(g.calls("neg")) == len(g.calls("exp")) == 2
    record = apply(g, "fold-a-log")["fold-a-log"]
    assert not g.calls("neg")
    assert not g.calls("exp")
    for i in range(2):
        name = f"backbone.layers.{i}.mixer.A"
        assert torch.equal(g.params()[name], -torch.exp(params[f"{name}_log"]))
        assert f"{name}_log" not in g.params()
    assert torch.equal(logits(g), expected)
    assert (record.error, len(record.matched), record.skipped) == (0.0, 2, [])
    scans = g.calls("ssmc::selective_scan") + g.calls("ssmc::ssd_scan")
    assert all(operands(scan)["A"].op == "get_attr" for scan in scans)


class Decays(nn.Module):
    """A name that is taken, a logarithm read twice, and one that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.A_log, self.other = (nn.Parameter(torch.rand(6, 3)) for _ in range(3))

    def forward(self, x: Tensor, B: Tensor) -> Tensor:
        y, _ = ops.selective_scan(x, x, -torch.exp(self.A_log), B, B)
        y, _ = ops.selective_scan(y, x, -torch.exp(self.A_log), B, B)
        y, _ = ops.selective_scan(y, x, -torch.exp(self.other), B, B)
        y, _ = ops.selective_scan(y, x, -torch.exp(self.A * 2.0), B, B)
        return y * self.A.sum()


def test_fold_a_log_takes_a_free_name() -> None:
    g = trace(Decays(), (torch.zeros(2, 5, 6), torch.zeros(2, 5, 3)))
    inputs = torch.randn(2, 5, 6), torch.randn(2, 5, 3)
    expected, params = g(*inputs)[0], g.params()
    record = apply(g, "fold-a-log", Context([inputs], inputs))["fold-a-log"]
    assert torch.equal(g(*inputs)[0], expected)
    assert torch.equal(g.params()["A"], params["A"])
    assert torch.equal(g.params()["A_1"], -torch.exp(params["A_log"]))
    assert torch.equal(g.params()["other_A"], -torch.exp(params["other"]))
    assert len(record.matched) == 3
    assert [s["reason"] for s in record.skipped] == ["its operand is computed, not a parameter"]
