"""Rotations: exact, folded into the right weights, and good for something."""

from __future__ import annotations

import pytest
import torch
from core.tiny import KINDS, WIDTH, apply, context, error, graph, logits, toy_context
from frontend.models import build
from torch import Tensor, nn

from ssmc import ops
from ssmc.core import Context, Graph
from ssmc.core.dialect import operands
from ssmc.errors import PassError, UsageError
from ssmc.frontend import trace

from .quantised import input_error
from .rotation import rotation

INNER = 2 * WIDTH


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("option", "block"), [("", INNER), ("{block=16}", 16), ("{block=20}", 20)])
def test_scan_output(kind: str, option: str, block: int) -> None:
    g = graph(kind)
    expected, params = logits(g), g.params()
    record = apply(g, f"hadamard{option}")["hadamard"]
    calls = g.calls("ssmc::hadamard")
    assert [n.args[1] for n in calls] == [block, block]
    for i, call in enumerate(calls):
        name = f"backbone.layers.{i}.mixer.out_proj"
        (reader,) = call.users
        assert reader.meta["owner"] == name
        # y W' is (H y) (W H')' for the orthogonal H
        turned = params[f"{name}.weight"] @ rotation(INNER, block).T
        assert error(g.params()[f"{name}.weight"], turned) < 1e-6
    assert set(record.diff.params) == {f"backbone.layers.{i}.mixer.out_proj.weight" for i in (0, 1)}
    assert (len(record.matched), record.skipped) == (2, [])
    assert error(logits(g), expected) < 2e-6
    assert record.error is not None
    assert record.error < 2e-6


@pytest.mark.parametrize(
    ("block", "message"),
    [
        *((n, f"no Hadamard matrix of order {n} is known") for n in (0, -4, 3, 92)),
        *((n, f"block of {n} does not divide a width of 80") for n in (12, 32, 160)),
    ],
)
def test_impossible_block(block: int, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        apply(graph("mamba"), f"hadamard{{block={block}}}")
    assert caught.value.exit_code == 2
    assert caught.value.hint or block <= 0


class LayerNorms(nn.Module):
    """A residual stream with a mean, read by LayerNorms with biases, and by others if asked."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 12)
        self.norms = nn.ModuleList([nn.LayerNorm(12), nn.LayerNorm(12), last])
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 16)
        for parameter in self.parameters():
            nn.init.normal_(parameter, mean=0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.head(self.norm(x))


def test_a_residual_stream_that_layer_norms_read() -> None:
    ids = torch.randint(16, (3, 7))
    g = trace(LayerNorms(nn.LayerNorm(12)), ids)
    expected = g(ids)[0]
    record = apply(g, "hadamard{residual=true}", Context([(ids,)], (ids,)))["hadamard"]
    assert len(record.matched) == 1
    assert (len(g.calls("ssmc::layer_norm")), len(g.calls("ssmc::rms_norm"))) == (0, 4)
    assert error(g(ids)[0], expected) < 1e-5


def test_layer_norms_and_rms_norms_do_not_share_a_rotated_stream() -> None:
    ids = torch.randint(16, (3, 7))
    g = trace(LayerNorms(nn.RMSNorm(12)), ids)
    with pytest.raises(PassError, match="an RMSNorm, reads what LayerNorms read"):
        apply(g, "hadamard{residual=true}", Context([(ids,)], (ids,)))


def test_width_without_a_full_order_is_rotated_in_blocks() -> None:
    g = graph("mamba", width=46)  # 92 = 4 * 23, and no construction gives 92
    expected = logits(g)
    apply(g, "hadamard{residual=true}")
    assert {n.args[1] for n in g.calls("ssmc::hadamard")} == {4}
    assert error(logits(g), expected) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passes", ["hadamard{residual=true}", "fold-norm,hadamard{residual=true}"])
def test_residual_stream(kind: str, passes: str) -> None:
    g = graph(kind)
    expected, params = logits(g), g.params()
    record = apply(g, passes)["hadamard"]
    after, h = g.params(), rotation(WIDTH, WIDTH)
    embedding = params["backbone.embeddings.weight"]
    head = params.get("lm_head.weight", embedding) * params["backbone.norm_f.weight"]
    assert error(after["backbone.embeddings.weight"], embedding @ h.T) < 1e-6
    assert error(after["lm_head.weight"], head @ h.T) < 1e-6
    for i in range(2):
        layer = f"backbone.layers.{i}"
        gamma = params[f"{layer}.norm.weight"]
        in_proj = params[f"{layer}.mixer.in_proj.weight"] * gamma
        assert error(after[f"{layer}.mixer.in_proj.weight"], in_proj @ h.T) < 1e-6
        out_proj = h @ params[f"{layer}.mixer.out_proj.weight"] @ rotation(INNER, INNER).T
        assert error(after[f"{layer}.mixer.out_proj.weight"], out_proj) < 1e-6
    assert all(operands(n)["weight"] is None for n in g.calls("ssmc::rms_norm"))
    assert error(logits(g), expected) < 3e-6
    assert record.error is not None
    assert record.error < 1e-5
    assert len(record.notes) == (kind == "mamba")


def test_residual_stream_with_biases() -> None:
    g = graph("mamba", use_bias=True)
    expected = logits(g)
    before = g.params()["backbone.layers.1.mixer.out_proj.bias"]
    apply(g, "hadamard{residual=true}")
    after = g.params()["backbone.layers.1.mixer.out_proj.bias"]
    assert error(after, rotation(WIDTH, WIDTH) @ before) < 1e-6
    assert error(logits(g), expected) < 3e-6


def test_tied_weights_are_untied_for_the_residual_stream_only() -> None:
    plain, rotated = graph("mamba"), graph("mamba")
    apply(plain, "hadamard")
    apply(rotated, "hadamard{residual=true}")
    assert "lm_head.weight" not in plain.params()
    assert "lm_head.weight" in rotated.params()


class Scan(nn.Module):
    """A scan whose output reaches what `reader(self, y)` does with it."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(-torch.rand(6, 3))
        self.select, self.out = nn.Linear(6, 3), nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B = self.select(x)
        y, _ = ops.selective_scan(x, x, self.A, B, B)
        return self.read(y)

    def read(self, y: Tensor) -> Tensor:
        return torch.tanh(y)


class Computed(Scan):
    def read(self, y: Tensor) -> Tensor:
        return ops.linear(y, self.out.weight * 2.0)


class Tied(Scan):
    def read(self, y: Tensor) -> Tensor:
        return self.out(torch.tanh(self.out(y)))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Scan, "its output reaches no linear layer"),
        (Computed, "its weight is computed"),
        (Tied, "its weight is tied: out.weight"),
    ],
)
def test_what_cannot_be_rotated_is_skipped(module: type[nn.Module], reason: str) -> None:
    g = trace(module(), torch.zeros(2, 5, 6))
    record = apply(g, "hadamard", toy_context())["hadamard"]
    assert record.matched == []
    assert record.skipped[0]["reason"].startswith(reason)
    assert not g.calls("ssmc::hadamard")


def test_residual_stream_that_cannot_be_rotated_is_named() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.out = nn.Embedding(128, 8), nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            return self.out(ops.rms_norm(x, None)) * torch.sigmoid(x)

    g = trace(Gated(), torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(PassError, match=r"hadamard: sigmoid reads the residual stream") as caught:
        apply(g, "hadamard{residual=true}")
    assert "leave residual=true out" in str(caught.value.hint)


def _scale_column(g: Graph, weight: str, column: int, by: float) -> None:
    node = next(n for n in g.nodes if n.target == weight)
    value = g.param(node).clone()
    value[..., column] *= by
    g.set_param(node, value)


@pytest.mark.parametrize("granularity", ["tensor", "free"])
def test_rotation_tames_an_outlier_of_the_scan_output(granularity: str) -> None:
    local, whole = {}, {}
    for passes in ("", "hadamard,"):
        g = graph("mamba")
        for i in range(2):
            _scale_column(g, f"backbone.layers.{i}.mixer.D", 5, 100.0)
            _scale_column(g, f"backbone.layers.{i}.mixer.out_proj.weight", 5, 1 / 100)
        records = apply(g, f"{passes}quantise{{granularity={granularity}}}", context())
        out_proj = g.node("backbone_layers_0_mixer_out_proj")
        local[passes] = input_error(g, out_proj)
        whole[passes] = records["quantise"].error or 0
    assert local["hadamard,"] < local[""] / 3, local
    assert whole["hadamard,"] < whole[""] / 1.2, whole


def zamba2() -> Graph:
    return trace(build("zamba2"))


def test_a_weight_that_layers_share_is_rotated_once_for_all_of_them() -> None:
    g, ids = zamba2(), torch.randint(0, 97, (2, 9))
    expected, _ = g(ids)
    record = apply(g, "hadamard", Context([], None))["hadamard"]
    shared = [n for n in g.params() if n.endswith(("o_proj.weight", "down_proj.weight"))]
    assert len(shared) == 2  # both layers have one block's weights
    assert len(record.matched) == len(g.calls("ssmc::hadamard")) == 4 + 2 * 2
    assert record.skipped == []
    assert error(g(ids)[0], expected) < 1e-5


def test_a_stream_beside_the_embedding_is_rotated_in_both_halves() -> None:
    g, ids = zamba2(), torch.randint(0, 97, (2, 9))
    (expected, _), before = g(ids), g.params()
    record = apply(g, "hadamard{residual=true}", Context([], None))["hadamard"]
    after, block = g.params(), "model.layers.1.shared_transformer"
    name = f"{block}.self_attn.q_proj.weight"
    gamma = before[f"{block}.input_layernorm.weight"]
    h = rotation(24)
    assert error(after[name], before[name] * gamma @ torch.block_diag(h, h).T) < 1e-6
    assert (
        error(after["model.layers.3.linear.weight"], h @ before["model.layers.3.linear.weight"])
        < 1e-6
    )
    assert len(record.notes) == 1  # the head, and no weight that the two layers share
    assert record.notes[0].startswith("lm_head.weight is no longer model.embed_tokens.weight")
    assert after.keys() - before.keys() == {"lm_head.weight"}
    assert error(g(ids)[0], expected) < 1e-5


def test_a_weight_with_another_reader_stays_as_it_is() -> None:
    g = zamba2()
    o_proj = next(n for n in g.calls("ssmc::linear") if n.name.endswith("o_proj"))
    with g.after(o_proj):
        other = g.call("ssmc::linear", o_proj.args[0], o_proj.args[1], None, like=o_proj)
    with g.after(other):
        total = g.call("add", o_proj, other, like=o_proj)
    o_proj.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    record = apply(g, "hadamard", Context([], None))["hadamard"]
    assert len(record.skipped) == 2
    assert all("o_proj.weight" in skip["reason"] for skip in record.skipped)
