"""Weights that several layers share: what they go on sharing, and what becomes their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core.tiny import Toy, apply, error, toy_context
from frontend.models import build, tokens
from torch import Tensor, nn

from ssmc import ops
from ssmc.core import Context, Graph, Record
from ssmc.core.dialect import operands
from ssmc.frontend import trace

WIDTH = 6


def test_layers_of_one_block_go_on_sharing_its_weights() -> None:
    g, ids = trace(build("zamba2")), tokens(2, 9)
    (expected, _), before = g(ids), g.params()
    record = apply(g, "fold-norm", Context([], None))["fold-norm"]
    after, block = g.params(), "model.layers.1.shared_transformer"
    for norm, layer in (
        ("input_layernorm", "self_attn.k_proj"),
        ("pre_ff_layernorm", "feed_forward.gate_up_proj"),
    ):
        name, gamma = f"{block}.{layer}.weight", before[f"{block}.{norm}.weight"]
        assert torch.equal(after[name], before[name] * gamma)
    assert record.notes == []
    assert [entry["node"] for entry in record.skipped] == ["model_final_layernorm"]
    assert before.keys() > after.keys()
    assert error(g(ids)[0], expected) < 2e-6


class Sites(nn.Module):
    """One layer at several sites, each behind a norm."""

    def __init__(self, *norms: nn.Module, bias: bool = True) -> None:
        super().__init__()
        self.norms, self.layer = nn.ModuleList(norms), nn.Linear(WIDTH, WIDTH, bias=bias)
        for parameter in self.norms.parameters():
            nn.init.normal_(parameter, mean=1)

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = x + self.layer(norm(x))
        return x


def _folded(module: nn.Module) -> tuple[Graph, Record]:
    """The graph with its norms folded; its values have to be the same."""
    g = trace(module, torch.zeros(2, 5, WIDTH))
    (x,) = next(toy_context().batches())
    expected, _ = g(x)
    record = apply(g, "fold-norm", toy_context())["fold-norm"]
    assert error(g(x)[0], expected) < 1e-6
    return g, record


def test_norms_of_equal_factors_agree() -> None:
    one, two = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
    module = Sites(one, two, one)
    two.load_state_dict(one.state_dict())
    g, record = _folded(module)
    assert len(record.matched) == 3
    assert record.notes == []
    assert torch.equal(g.params()["layer.weight"], module.layer.weight * one.weight)
    assert g.params().keys() == {"layer.weight", "layer.bias"}


def test_norms_that_disagree_give_their_layers_weights_of_their_own() -> None:
    one, two = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
    module = Sites(one, two, one)
    g, record = _folded(module)
    assert len(record.matched) == 3
    assert record.skipped == []
    assert record.notes == [
        "layer.weight_1 is no longer layer.weight: 36 values more, 144 bytes before they are "
        "quantised"
    ]
    assert torch.equal(g.params()["layer.weight"], module.layer.weight * one.weight)
    assert torch.equal(g.params()["layer.weight_1"], module.layer.weight * two.weight)


def test_a_call_without_a_norm_keeps_the_weight_as_it_is() -> None:
    module = Toy()
    g, record = _folded(module)
    assert len(record.matched) == len(record.notes) == 1
    assert torch.equal(g.params()["up.weight"], module.up.weight)
    assert torch.equal(g.params()["up.weight_1"], module.up.weight * module.gamma)


def test_a_norm_that_cannot_be_folded_does_not_keep_others_from_it() -> None:
    class Kept(Sites):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norms[0](x)
            return super().forward(x) + torch.tanh(y) + self.layer(y)

    module = Kept(nn.RMSNorm(WIDTH))
    g, record = _folded(module)
    assert (len(record.matched), len(record.skipped)) == (1, 1)
    assert torch.equal(g.params()["layer.weight"], module.layer.weight)


def test_biases_of_norms_agree_or_not() -> None:
    one, two = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
    module = Sites(one, one, two)
    g, record = _folded(module)
    assert len(record.matched) == 3
    assert g.params().keys() == {
        f"layer.{name}{own}" for name in ("weight", "bias") for own in ("", "_1")
    }
    for own, norm in (("", one), ("_1", two)):
        bias = module.layer.bias + module.layer.weight @ norm.bias
        assert torch.equal(g.params()[f"layer.weight{own}"], module.layer.weight * norm.weight)
        assert torch.equal(g.params()[f"layer.bias{own}"], bias)


def test_layers_without_a_bias_share_the_one_that_a_norm_gives_them() -> None:
    g, _ = _folded(Sites(*[nn.LayerNorm(WIDTH)] * 2, bias=False))
    assert g.params().keys() == {"layer.weight", "layer.bias"}


class Stream(nn.Module):
    """A layer that reads the residual stream at one site, and writes it at another, if asked."""

    def __init__(self, write: bool) -> None:
        super().__init__()
        self.write = write
        self.embedding, self.head = nn.Embedding(16, 12), nn.Linear(12, 16)
        self.layer, self.out = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        y = torch.tanh(self.layer(ops.rms_norm(x, None)))
        x = x + (self.layer(y) if self.write else self.out(torch.tanh(self.layer(y))))
        return self.head(ops.rms_norm(x, None))


def test_a_weight_read_beside_the_residual_stream_is_untied() -> None:
    for write in (False, True):
        g, ids = trace(Stream(write), torch.zeros(2, 5, dtype=torch.int64)), torch.arange(16)[None]
        expected, _ = g(ids)
        record = apply(g, "hadamard{residual=true}", Context([(ids,)], (ids,)))["hadamard"]
        assert [note.partition(":")[0] for note in record.notes][:1] == [
            "layer.weight_1 is no longer layer.weight"
        ]
        assert error(g(ids)[0], expected) < 2e-6
        assert all(operands(n)["weight"] is None for n in g.calls("ssmc::rms_norm"))


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_a_head_behind_a_norm_without_factors_stays_tied_to_the_embedding(norm: Any) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.layer = nn.Embedding(16, 12), nn.Linear(12, 12)
            self.norm = norm(12, elementwise_affine=False)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            x = x + self.layer(self.norm(x))
            return ops.linear(self.norm(x), self.embedding.weight)

    ids = torch.arange(16)[None]
    g = trace(Tied(), ids)
    (expected, _), before = g(ids), g.params()
    record = apply(g, "hadamard{residual=true}", Context([(ids,)], (ids,)))["hadamard"]
    assert record.notes == []
    assert g.params().keys() == before.keys()
    assert error(g.params()["embedding.weight"], before["embedding.weight"]) > 0.1
    assert error(g(ids)[0], expected) < 2e-6
