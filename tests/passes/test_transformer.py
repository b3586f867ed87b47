"""Passes on attention and gated MLPs: where they apply, what they change, what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from core.tiny import WIDTH, apply, error, graph, logits, toy_context, values
from tiny import compile_tiny
from torch import Tensor, nn

import ssmc
from ssmc import ops
from ssmc.core import Graph, is_call
from ssmc.core.dialect import operands
from ssmc.corpus import read_texts, token_windows
from ssmc.evaluate import perplexity
from ssmc.frontend import load_model, trace
from ssmc.lowering import lower
from ssmc.passes._transformer import attentions, gated_mlps, mlps
from ssmc.passes.smooth import factors

from .quantised import form
from .rotation import rotation

FindPath = Callable[[str], Path]
LAYER = "model.layers.1"
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
INNER = 48


def test_roles() -> None:
    g = graph("llama")
    roles = Counter(n.meta["role"] for n in g.nodes if n.meta.get("role"))
    assert roles == Counter(
        dict.fromkeys((*LAYERS, "attention"), 2) | {"norm": 5, "embedding": 1, "head": 1}
    )
    for role in LAYERS:
        (node,) = (n for n in g.nodes if (n.meta.get("role"), n.meta.get("layer")) == (role, 1))
        assert str(node.meta["owner"]).endswith(role)


class Fused(nn.Module):
    """An MLP whose first layer gives both factors, the gate second."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(6, 16, bias=False), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.both(ops.rms_norm(x, None)).chunk(2, -1)
        return self.down(up * nn.functional.gelu(gate))


def test_both_factors_from_one_layer() -> None:
    g = trace(Fused(), torch.zeros(2, 5, 6))
    (mlp,) = gated_mlps(g)
    assert {role: n.meta["owner"] for role, n in mlp.parts().items()} == {
        "gate_up_proj": "both",
        "down_proj": "down",
    }
    x, before = torch.randn(2, 7, 6), g.params()["both.weight"]
    expected = g(x)[0]
    record = apply(g, "smooth", toy_context())["smooth"]
    assert len(record.matched) == 2
    after = g.params()["both.weight"]
    assert error(g(x)[0], expected) < 2e-6
    ratio = after / before  # columns by the norm, rows of `up` by the factors of down_proj
    assert error(ratio[8:], ratio[8:9].expand(8, 6)) < 1e-5
    assert not torch.allclose(ratio[:8], ratio[8:9].expand(8, 6), rtol=1e-2)


class Squared(nn.Module):
    """An MLP without a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.relu(self.up(ops.rms_norm(x, None)) * 2.0) ** 2)


def test_an_mlp_without_a_gate() -> None:
    g = trace(Squared(), torch.zeros(2, 5, 6))
    (mlp,) = mlps(g)
    assert {role: n.meta["owner"] for role, n in mlp.parts().items()} == {
        "up_proj": "up",
        "down_proj": "down",
    }
    x = torch.randn(2, 7, 6)
    expected, weight = g(x)[0], g.params()["down.weight"]
    record = apply(g, "hadamard", toy_context())["hadamard"]
    assert record.matched == ["down"]
    assert error(g.params()["down.weight"], weight @ rotation(12).T) < 1e-6
    assert error(g(x)[0], expected) < 2e-6
    record = apply(g, "smooth", toy_context())["smooth"]
    assert [entry["node"] for entry in record.skipped] == ["down"]


def test_layers_without_an_activation_between_them_are_no_mlp() -> None:
    class Two(Squared):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x) * 2.0)

    assert mlps(trace(Two(), torch.zeros(2, 5, 6))) == []


def test_a_product_of_two_activations_is_no_gated_mlp() -> None:
    class Product(Fused):
        def forward(self, x: Tensor) -> Tensor:
            up, gate = self.both(x).chunk(2, -1)
            return self.down(torch.tanh(up) * gate)

    assert gated_mlps(trace(Product(), torch.zeros(2, 5, 6))) == []


def test_attention_of_values_that_no_layer_computes() -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor, position: Tensor) -> Tensor:
            return ops.attention(x, torch.sin(x), x, position)

    g = trace(Bare(), (torch.zeros(2, 5, 2, 6), torch.zeros(2, dtype=torch.int64)))
    (found,) = attentions(g)
    assert found.parts() == {"attention": found.call}


def test_rotations() -> None:
    g = graph("llama")
    expected, params = logits(g), g.params()
    record = apply(g, "hadamard")["hadamard"]
    assert (len(record.matched), record.skipped) == (4, [])
    assert {
        n.meta["owner"].rpartition(".")[2] for c in g.calls("ssmc::hadamard") for n in c.users
    } == {
        "o_proj",
        "down_proj",
    }
    for name, width in ((f"{LAYER}.self_attn.o_proj", WIDTH), (f"{LAYER}.mlp.down_proj", INNER)):
        turned = params[f"{name}.weight"] @ rotation(width).T
        assert error(g.params()[f"{name}.weight"], turned) < 1e-6
    assert len(record.diff.params) == 4
    assert error(logits(g), expected) < 2e-6


@pytest.mark.parametrize("biases", [False, True])
def test_residual_stream(biases: bool) -> None:
    g = graph("llama", attention_bias=biases, mlp_bias=biases)
    expected, params = logits(g), g.params()
    apply(g, "hadamard{residual=true}")
    after, h = g.params(), rotation(WIDTH)
    gamma = params[f"{LAYER}.input_layernorm.weight"]
    k_proj = params[f"{LAYER}.self_attn.k_proj.weight"] * gamma
    assert error(after[f"{LAYER}.self_attn.k_proj.weight"], k_proj @ h.T) < 1e-6
    down = h @ params[f"{LAYER}.mlp.down_proj.weight"] @ rotation(INNER).T
    assert error(after[f"{LAYER}.mlp.down_proj.weight"], down) < 1e-6
    assert all(operands(n)["weight"] is None for n in g.calls("ssmc::rms_norm"))
    assert error(logits(g), expected) < 3e-6


def test_smoothing_divides_the_rows_of_up_proj() -> None:
    g = graph("llama")
    (name,) = (
        n.args[0].name
        for n in g.calls("ssmc::linear")
        if n.meta["owner"] == f"{LAYER}.mlp.down_proj"
    )  # type: ignore[union-attr]
    before, expected, params = values(g, name)[name], logits(g), g.params()
    record = apply(g, "smooth")["smooth"]
    s = factors(before.flatten(0, -2).abs().amax(0), [params[f"{LAYER}.mlp.down_proj.weight"]], 0.5)
    down = params[f"{LAYER}.mlp.down_proj.weight"] * s
    assert error(g.params()[f"{LAYER}.mlp.down_proj.weight"], down) < 1e-6
    assert error(values(g, name)[name], before / s) < 1e-5
    assert record.skipped == []
    assert len(record.matched) == 2 * 7 + 1
    assert error(logits(g), expected) < 3e-6


def _forms(g: Graph) -> dict[str, tuple[str, str]]:
    """How input and weight of the layers of each role are quantised."""
    return {
        str(n.meta["role"]): (form(g, n.args[0]), form(g, n.args[1]))
        for n in g.calls("ssmc::linear")
    }


def test_eight_bits() -> None:
    g = graph("llama")
    apply(g, "hadamard,quantise")
    rows = {"q_proj": 40, "k_proj": 20, "v_proj": 20, "o_proj": 40, "gate_proj": 48, "up_proj": 48}
    rows |= {"down_proj": 40, "head": 128}
    assert _forms(g) == {role: ("token", f"int8[{n}, 1]") for role, n in rows.items()}
    assert len(g.calls("ssmc::quantize_dynamic")) == 2 * 4 + 1  # q, k, v and gate, up share theirs


@pytest.mark.parametrize(
    ("passes", "packed"),
    [
        ("hadamard,absmax,quantise{weights=4,group=4,activations=16},gptq", 14),
        ("hadamard,absmax,quantise{weights=4,group=4,scope=all}", 15),
        ("quantise{overrides=o_proj:w4a8;layers.0.mlp.*:w4a16,group=4}", 5),
    ],
)
def test_few_bits(passes: str, packed: int) -> None:
    g = graph("llama")
    records = apply(g, passes)
    weights = (n.args[1] for n in g.calls("ssmc::linear"))
    groups = [w for w in weights if is_call(w, "ssmc::dequantize_groups") and w.args[2] == 4]
    assert len(groups) == packed
    if "gptq" in records:
        assert len(records["gptq"].matched) >= packed - 2


def test_lowered_layers_are_integer_products() -> None:
    compiled = compile_tiny("llama", "hadamard,percentile,quantise,kv-cache")
    lowered = lower(compiled.graph, "reference")
    assert lowered.kept == []
    fused = {n.name: n for n in lowered.graph.nodes if n.name in lowered.fused}
    roles = Counter(node.meta["role"] for node in fused.values())
    assert roles == Counter(dict.fromkeys(("attention", *LAYERS), 3) | {"embedding": 1, "head": 1})


@pytest.mark.slow
@pytest.mark.parametrize("passes", ["hadamard,percentile", "hadamard,percentile,quantise,kv-cache"])
def test_perplexity_of_a_trained_model(
    passes: str, shared_model: FindPath, shared_data: FindPath
) -> None:
    model = load_model(str(shared_model("llama-6m")))
    texts = read_texts(shared_data("test.jsonl"))
    assert model.tokenizer is not None
    windows = token_windows(model.tokenizer, texts, model.eos_token_id, 512)[:16]  # type: ignore[arg-type]
    compiled = ssmc.compile(
        str(model.folder), passes=passes, samples=16, calibration=shared_data("calib512.jsonl")
    )
    before, after = (perplexity(m, windows).perplexity for m in (trace(model.module), compiled))
    assert after / before < 1.003
