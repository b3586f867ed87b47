"""A traced language model computes what Hugging Face's eager one does, in every way it is run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from ssmc.core import dialect
from ssmc.core.graph import BATCH, LENGTH, Graph
from ssmc.core.state import OPEN, StateSpec, fresh_states
from ssmc.errors import UsageError
from ssmc.frontend import load_model, trace

from .models import ARCHITECTURES, SHAPES, build, error, logits, tokens

TOLERANCE = 1e-5


@pytest.fixture(params=ARCHITECTURES, scope="module")
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, Graph]:
    model = build(request.param)
    return model, trace(model)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_eager_model(
    pair: tuple[nn.Module, Graph], shape: tuple[int, int]
) -> None:
    model, graph = pair
    ids = tokens(*shape)
    assert error(graph(ids)[0], logits(model, ids)) < TOLERANCE


@pytest.mark.parametrize("parts", [[9, 1, 1, 2, 7], [1] * 20, [19, 1]])
def test_prefill_in_parts_equals_the_whole(pair: tuple[nn.Module, Graph], parts: list[int]) -> None:
    model, graph = pair
    ids = tokens(3, 20)
    outputs, states = [], None
    for part in ids.split(parts, dim=1):
        output, states = graph(part, states=states)
        outputs.append(output)
    assert error(torch.cat(outputs, dim=1), logits(model, ids)) < TOLERANCE


@pytest.mark.parametrize("name", ["mamba-5m", "mamba2-6m", "llama-6m", "jamba-11m"])
def test_trained_models_agree(name: str, shared_model: Callable[[str], Path]) -> None:
    model = load_model(str(shared_model(name)))
    graph = trace(model.module)
    for shape in SHAPES:
        ids = torch.randint(2, 8192, shape)
        assert error(graph(ids)[0], logits(model.module, ids)) < TOLERANCE


def test_graph_holds_the_dialect_only(pair: tuple[nn.Module, Graph]) -> None:
    _, graph = pair
    assert {n.op for n in graph.nodes} == {"placeholder", "get_attr", "call_function", "output"}
    assert all(dialect.is_legal(n.target) for n in graph.nodes if n.op == "call_function")
    names = {dialect.target_name(n.target) for n in graph.nodes if n.op == "call_function"}
    assert not names & {"squeeze", "transpose", "to_dtype"}  # nothing but the model
    assert len(graph.calls("size")) == ("position" in {spec.name for spec in graph.states})


def test_module_is_left_as_it_was() -> None:
    model = build("mamba").train()
    model.backbone.layers[1].eval()
    before = {name: copy.copy(vars(module)) for name, module in model.named_modules()}
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = trace(model)
    for tensor in graph.params().values():
        assert not tensor.requires_grad
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert module.training == before[name]["training"]
    assert all(torch.equal(t, tensors[name]) for name, t in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_module_is_left_as_it_was_when_tracing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mamba")
    monkeypatch.setattr(model.backbone.layers[2].mixer, "activation", "gelu")
    with pytest.raises(Exception, match="activation 'gelu'"):
        trace(model)
    assert all("forward" not in vars(module) for module in model.modules())


def test_names_owners_layers_and_states() -> None:
    graph = trace(build("mamba"))
    node = graph.node("backbone_layers_1_mixer_in_proj")
    assert (node.meta["owner"], node.meta["layer"]) == ("backbone.layers.1.mixer.in_proj", 1)
    for name in ("dt_proj", "conv1d", "x_proj", "selective_scan"):
        assert graph.node(f"backbone_layers_2_mixer_{name}").meta["layer"] == 2
    dt_proj = graph.node("backbone_layers_0_mixer_dt_proj")
    assert dialect.operands(dt_proj)["bias"] is None  # it goes into the scan
    assert graph.node("lm_head").meta["layer"] is None
    assert graph.inputs == ("input_ids",)
    assert graph.states[:2] == (StateSpec("l0_conv", (3, 48)), StateSpec("l0_ssm", (48, 5)))
    assert [n.name for n in graph.nodes if n.op == "placeholder"][1:3] == ["l0_conv", "l0_ssm"]
    assert tuple(node.meta["val"].shape) == (BATCH, LENGTH, 96)


def test_states_of_mamba2() -> None:
    states = trace(build("mamba2-groups")).states
    assert states[-2:] == (StateSpec("l2_conv", (3, 96)), StateSpec("l2_ssm", (6, 8, 12)))


def test_states_of_attention() -> None:
    graph = trace(build("llama"))
    row = (OPEN, 2, 6)
    assert graph.states[:3] == (
        StateSpec("position", (), torch.int64),
        StateSpec("l0_k", row),
        StateSpec("l0_v", row),
    )
    assert len(graph.states) == 7
    assert [n.name for n in graph.new_states[:3]] == ["position_next", "l0_k_next", "l0_v_next"]
    _, states = graph(tokens(2, 5))
    assert states["position"].tolist() == [5, 5]
    assert states["l2_v"].shape == (2, 5, 2, 6)


def test_caches_make_room_for_what_comes() -> None:
    graph = trace(build("llama"))
    ids = tokens(1, 12)
    rooms, states = [], None
    for token in ids.split(1, 1):
        _, states = graph(token, states=states)
        rooms.append(states["l0_k"].shape[1])
    assert rooms == [1, 2, 4, 4, 8, 8, 8, 8, 16, 16, 16, 16]
    _, whole = graph(ids)
    assert error(states["l0_k"][:, :12], whole["l0_k"]) < TOLERANCE
    assert not states["l0_k"][:, 12:].any()
    with pytest.raises(UsageError, match="a cache of 12 tokens has no room for 13"):
        graph.run(ids[:, :1], states=whole)


def test_sequences_of_different_lengths_go_on_together() -> None:
    model = build("llama")
    graph = trace(model)
    ids = tokens(2, 12)
    fresh = fresh_states(graph.states, 1, room=12)
    parts = [graph.run(part, states=fresh)[1] for part in (ids[:1, :5], ids[1:, :8])]
    states = {name: torch.cat([part[name] for part in parts]) for name in fresh}
    following = torch.stack([ids[0, 5:9], ids[1, 8:12]])
    actual = graph(following, states=states)[0]
    assert error(actual[0], logits(model, ids[:1, :9])[0, 5:]) < TOLERANCE
    assert error(actual[1], logits(model, ids[1:])[0, 8:]) < TOLERANCE


def test_parameters_keep_their_names_and_share_memory() -> None:
    model = build("mamba")
    named = dict(model.named_parameters())
    params = trace(model).params()
    assert params.keys() == named.keys()
    name = "backbone.layers.0.mixer.conv1d.weight"
    assert params[name].shape == (48, 4)
    assert params[name].data_ptr() == named[name].data_ptr()


def test_tied_head_reads_the_embedding() -> None:
    graph = trace(build("mamba", tie_word_embeddings=True))
    head, embedding = graph.node("lm_head"), graph.node("backbone_embeddings")
    assert head.args[1] is embedding.args[1]
    assert head.args[1].target == "backbone.embeddings.weight"


def test_untied_head_has_its_own_weight() -> None:
    graph = trace(build("mamba2", tie_word_embeddings=False))
    assert graph.node("lm_head").args[1].target == "lm_head.weight"


@pytest.mark.parametrize("architecture", ["mamba2", "llama"])
def test_sixteen_bit_model_is_traced_in_float32(architecture: str) -> None:
    model = build(architecture)
    exact = build(architecture).bfloat16().float()
    graph = trace(model.bfloat16())
    assert {t.dtype for t in graph.params().values()} == {torch.float32}
    ids = tokens(2, 9)
    assert error(graph(ids)[0], logits(exact, ids)) < TOLERANCE


def test_64_layers_on_the_meta_device() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    with torch.device("meta"):
        model = MambaForCausalLM(MambaConfig(hidden_size=2560, num_hidden_layers=64))
    graph = trace(model)
    assert len(graph.calls("ssmc::selective_scan")) == 64
    assert len(graph.states) == 128
    assert graph.result.meta["val"].shape == (BATCH, LENGTH, 50280)
    assert next(iter(graph.params().values())).is_meta


def test_graph_can_be_copied_and_deep_copied() -> None:
    graph = trace(build("mamba"))
    ids = tokens(2, 5)
    assert torch.equal(graph.copy()(ids)[0], graph(ids)[0])
    assert isinstance(copy.deepcopy(graph.module), fx.GraphModule)
