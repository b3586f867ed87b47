"""Values of attention, rotated head by head: offline, exact, and better to round in a cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from core.tiny import WIDTH, apply, error, graph, logits, values
from frontend.models import build, tokens
from tiny import compile_tiny
from torch import Tensor, nn

from ssmc import ops
from ssmc.core import Context, Graph
from ssmc.core.dialect import operands
from ssmc.corpus import read_texts, token_windows
from ssmc.frontend import load_model, trace
from ssmc.passes._transformer import attentions
from ssmc.runtime import CompiledModel
from ssmc.runtime.verify import verify

from .rotation import rotation

FindPath = Callable[[str], Path]
ATTENTION = "model.layers.1.self_attn"
VALUES = "hadamard{values=true}"
HEADS, GROUPS = 4, 2
HYBRIDS = ["llama-biases", "jamba", "bamba", "granite", "falcon-h1", "nemotron", "qwen3"]


@pytest.mark.parametrize("kind", ["llama", "jamba"])
def test_heads_are_turned_in_v_proj_and_back_in_o_proj(kind: str) -> None:
    g, width = graph(kind), WIDTH // HEADS
    expected, before = logits(g), g.params()
    record = apply(g, VALUES)["hadamard"]
    after, r = g.params(), rotation(width)
    v_proj, o_proj = (f"{ATTENTION}.{name}.weight" for name in ("v_proj", "o_proj"))
    heads = before[v_proj].unflatten(0, (GROUPS, width))
    assert error(after[v_proj], torch.einsum("ij,gjk->gik", r, heads).flatten(0, 1)) < 1e-6
    columns = before[o_proj].unflatten(1, (HEADS, width))
    assert error(after[o_proj], (columns @ r.T).flatten(1)) < 1e-6
    assert record.skipped == []
    assert error(logits(g), expected) < 2e-6


@pytest.mark.parametrize(
    ("head", "block"), [(2, 2), (10, 2), (12, 12), (16, 16), (28, 28), (92, 4)]
)
def test_heads_of_any_size_with_biases(head: int, block: int) -> None:
    g = graph("llama", head_dim=head, attention_bias=True)
    expected, bias = logits(g), g.params()[f"{ATTENTION}.v_proj.bias"]
    record = apply(g, VALUES)["hadamard"]
    turned = bias.unflatten(0, (GROUPS, head)) @ rotation(head, block).T
    assert error(g.params()[f"{ATTENTION}.v_proj.bias"], turned.flatten()) < 1e-6
    in_blocks = f"width {head}: rotated in {head // block} blocks of {block}"
    assert (in_blocks in record.notes) == (block < head)
    assert error(logits(g), expected) < 2e-6


@pytest.mark.parametrize("architecture", HYBRIDS)
def test_nothing_is_rotated_online_for_it(architecture: str) -> None:
    g = trace(build(architecture))
    batch = (tokens(4, 33),)
    expected, _ = g(*batch)
    records = apply(g, "hadamard{residual=true,values=true},smooth", Context([batch], batch))
    assert records["hadamard"].skipped == []
    found = attentions(g)
    assert found
    for one in found:
        assert one.o_proj is not None
        assert operands(one.o_proj)["x"].target is not torch.ops.ssmc.hadamard.default
    assert error(g(*batch)[0], expected) < 1e-5


@pytest.mark.parametrize("biases", [False, True])
def test_smoothing_divides_the_rows_of_v_proj(biases: bool) -> None:
    g, width = graph("llama", attention_bias=biases), WIDTH // HEADS
    apply(g, "linears")
    (x,) = (n.args[0] for n in g.calls("ssmc::linear") if n.meta["owner"] == f"{ATTENTION}.o_proj")
    (v,) = (n for n in g.calls("ssmc::linear") if n.meta["owner"] == f"{ATTENTION}.v_proj")
    before, expected, params = values(g, x.name, v.name), logits(g), g.params()
    record = apply(g, "smooth")["smooth"]
    assert record.skipped == []
    # Two heads of queries read a group of values, so that they have its factors.
    o_proj = f"{ATTENTION}.o_proj.weight"
    largest = before[x.name].flatten(0, -2).abs().amax(0).view(GROUPS, -1, width).amax(1)
    columns = params[o_proj].abs().amax(0).view(GROUPS, -1, width).amax(1)
    s = (largest / columns).sqrt()
    assert error(g.params()[o_proj], params[o_proj] * s.repeat_interleave(2, 0).flatten()) < 1e-5
    assert error(values(g, v.name)[v.name], before[v.name] / s.flatten()) < 1e-5
    assert error(logits(g), expected) < 3e-6


def test_smoothing_stops_at_a_rotation_in_front_of_o_proj() -> None:
    g = graph("llama")
    record = apply(g, "hadamard,smooth")["smooth"]
    (reason,) = {e["reason"] for e in record.skipped if e["node"].endswith("1_self_attn_o_proj")}
    assert "attention, which computes its input, cannot take a factor" in reason
    assert "o_proj_hadamard stands between it and" in reason


def test_caches_hold_rotated_values() -> None:
    plain, turned = graph("llama"), graph("llama")
    apply(turned, VALUES)
    ids = tokens(2, 9)
    (_, before), (_, after) = plain(ids), turned(ids)
    assert error(after["l1_v"], before["l1_v"] @ rotation(WIDTH // HEADS).T) < 1e-5
    assert error(after["l1_k"], before["l1_k"]) < 1e-5
    parts, states = [], None
    for part in ids.split([4, 1, 4], 1):
        result, states = turned(part, states=states)
        parts.append(result)
    assert error(torch.cat(parts, 1), plain(ids)[0]) < 2e-6


def test_an_outlier_among_the_values_no_longer_widens_the_steps_of_a_cache() -> None:
    errors = {}
    for passes in ("hadamard", VALUES):
        g = graph("llama", head_dim=16)
        for i in range(2):
            _widen(g, f"model.layers.{i}.self_attn", 16)
        expected = logits(g)
        apply(g, f"{passes},kv-cache")
        errors[passes] = error(logits(g), expected)
    assert errors[VALUES] < errors["hadamard"] / 2, errors


def _widen(g: Graph, attention: str, width: int) -> None:
    """The third channel of each head of values times 100, taken back behind attention."""
    for name, rows, by in (("v_proj", True, 100.0), ("o_proj", False, 0.01)):
        node = next(n for n in g.nodes if n.target == f"{attention}.{name}.weight")
        weight = g.param(node).clone()
        (weight if rows else weight.T)[2::width] *= by
        g.set_param(node, weight)


def test_lowered_is_simulated_with_values_in_eight_bits() -> None:
    compiled = compile_tiny("llama", f"{VALUES},percentile,quantise,kv-cache")
    assert compiled.lowered.kept == []
    assert all(c.agrees for c in verify(compiled, tokens(2, 21)))
    found = verify(CompiledModel(compiled.artefact, "reference"), tokens(2, 21))
    assert all(c.differing == 0 and c.error == 0 for c in found)


class Layer(nn.Module):
    """Attention of heads of 6 over itself, with values and outputs that subclasses change."""

    def __init__(self) -> None:
        super().__init__()
        self.v_proj, self.o_proj = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm = nn.Parameter(torch.rand(3) + 0.5)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 3))
        v = self.values(self.v_proj(x).unflatten(-1, (2, 3)))
        y = ops.attention(heads, self.keys(heads, v), v, position).flatten(-2)
        return self.output(self.o_proj, y)

    def values(self, v: Tensor) -> Tensor:
        return v

    def keys(self, k: Tensor, v: Tensor) -> Tensor:
        return k

    def output(self, o_proj: nn.Module, y: Tensor) -> Tensor:
        return o_proj(y)


class Normed(Layer):
    def values(self, v: Tensor) -> Tensor:
        return ops.rms_norm(v, self.norm)


class KeysAreValues(Layer):
    def keys(self, k: Tensor, v: Tensor) -> Tensor:
        return v


class ReadTwice(Layer):
    def output(self, o_proj: nn.Module, y: Tensor) -> Tensor:
        return o_proj(y) + y


class Tied(Layer):
    def output(self, o_proj: nn.Module, y: Tensor) -> Tensor:
        return o_proj(torch.tanh(o_proj(y)))


class Gated(Layer):
    def output(self, o_proj: nn.Module, y: Tensor) -> Tensor:
        return o_proj(y * torch.sigmoid(y))


INPUTS = (torch.randn(2, 5, 6), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Normed, "rms_norm stands between v_proj and it"),
        (KeysAreValues, "unflatten_1 is not its values alone"),
        (ReadTwice, "add reads flatten as well"),
        (Tied, "the weight of o_proj is tied"),
        (Gated, "it has no linear layer for its output"),
    ],
)
def test_what_cannot_be_turned_is_skipped(module: type[Layer], reason: str) -> None:
    g = trace(module(), INPUTS)
    before = g.params()
    record = apply(g, VALUES, Context([], INPUTS))["hadamard"]
    assert record.skipped[0]["reason"] == f"its values are not rotated: {reason}"
    assert torch.equal(g.params()["v_proj.weight"], before["v_proj.weight"])


def test_the_layer_that_those_are_changed_from_is_rotated() -> None:
    g = trace(Layer(), INPUTS)
    record = apply(g, VALUES, Context([], INPUTS))["hadamard"]
    assert (record.matched, record.skipped) == (["v_proj", "o_proj"], [])


@pytest.mark.parametrize(("name", "outliers"), [("llama-6m", True), ("jamba-11m", False)])
def test_values_of_trained_models_are_rounded_like_those_without_outliers(
    name: str, outliers: bool, shared_model: FindPath, shared_data: FindPath
) -> None:
    """The figures in docs/accuracy.md: the error of cached values and keys by int8."""
    model = load_model(str(shared_model(name)))
    texts = read_texts(shared_data("test.jsonl"))
    assert model.tokenizer is not None
    windows = token_windows(model.tokenizer, texts, model.eos_token_id, 256)[:2]  # type: ignore[arg-type]
    g = trace(model.module)
    expected, before = g(windows)
    record = apply(g, VALUES, Context([], (windows[:, :32],)))["hadamard"]
    assert record.skipped == []
    actual, after = g(windows)
    assert error(actual, expected) < 2e-6
    normal = _rounding([torch.randn(10000, 64)])
    values_before, values_after, keys = (
        [state for name, state in states.items() if name.endswith(kind)]
        for states, kind in ((before, "_v"), (after, "_v"), (before, "_k"))
    )
    assert (_rounding(values_before) > 1.2 * normal) == outliers
    assert _rounding(values_after) < 1.05 * normal
    turned = [ops.hadamard(k.contiguous(), k.shape[-1]) for k in keys]
    found = {"values": values_before, "rotated values": values_after}
    found |= {"keys": keys, "rotated keys": turned}
    print({kind: f"{100 * _rounding(each):.2f} %" for kind, each in found.items()})


def _rounding(kept: list[Tensor]) -> float:
    """The relative error that int8 makes, of the layer where it is largest."""
    return max(error(ops.dequantize(*ops.quantize_dynamic(v)), v) for v in kept)
