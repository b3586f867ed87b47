"""Graphs read back as checkpoints of the model they were traced from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ssmc
from ssmc.export.checkpoint import Checkpoint, called_linears, read_checkpoint
from ssmc.frontend import huggingface
from ssmc.runtime import CompiledModel


def model_of(found: Checkpoint) -> Any:
    """The float model of a checkpoint, every tensor of which has to be there."""
    skeleton: Any = huggingface.skeleton(huggingface.config(found.config, "test"))
    module = type(skeleton)(skeleton.config).eval()
    module.load_state_dict(found.tensors, strict=True)
    return module


def compiled(model: str, passes: str, scheme: str) -> CompiledModel:
    return ssmc.compile(model, passes=passes, scheme=scheme, samples=2, length=64)


@torch.no_grad()
def error(found: CompiledModel) -> float:
    """Of the checkpoint's logits, relative to those of the graph."""
    ids = torch.randint(8000, (2, 24))
    expected = found.graph(ids)[0]
    logits = model_of(read_checkpoint(found.artefact))(ids, use_cache=False).logits
    return float((logits - expected).norm() / expected.norm())


def test_a_float_graph_with_rotations_folded() -> None:
    found = compiled("demo", "hadamard{residual=true}", "none")
    checkpoint = read_checkpoint(found.artefact)
    assert not checkpoint.stored
    assert not checkpoint.kept
    assert checkpoint.config["tie_word_embeddings"] is False  # the head has the norm's weight
    name = "backbone.layers.0.mixer.in_proj.weight"
    before = ssmc.load_model("demo").module.state_dict()[name]
    assert not torch.allclose(checkpoint.tensors[name], before, atol=1e-2)
    assert error(found) < 1e-5


@pytest.mark.parametrize("name", ["mamba2-6m", "jamba-11m", "llama-6m"])
def test_other_models_in_float(shared_model: Callable[[str], Path], name: str) -> None:
    assert error(compiled(str(shared_model(name)), "hadamard{residual=true}", "none")) < 1e-5


def test_integers_whose_inputs_change_at_run_time_are_turned_back() -> None:
    found = compiled("demo", "hadamard,percentile", "w8a8")
    checkpoint = read_checkpoint(found.artefact)
    prefix = "backbone.layers.3.mixer"
    before = ssmc.load_model("demo").module.state_dict()
    # It is the weight again, but for what rounding a row to 8 bits has cost: half a step, or a
    # 254th of the row's largest value, in each column (in x_proj, times that column's scale).
    for layer, reason in (("out_proj", "rotated at run time"), ("x_proj", "one a channel")):
        name = f"{prefix}.{layer}.weight"
        assert reason in checkpoint.kept[name]
        distance = (checkpoint.tensors[name] - before[name]).norm() / before[name].norm()
        assert 0 < distance < 0.05
    assert f"{prefix}.in_proj.weight" in checkpoint.stored
    assert "without calling it" in checkpoint.kept[f"{prefix}.dt_proj.weight"]


def test_stored_integers_are_those_of_the_tensor() -> None:
    found = compiled("demo", "quantise{granularity=token,weights=4,group=32}", "w8a8")
    checkpoint = read_checkpoint(found.artefact)
    groups = {stored.group for stored in checkpoint.stored.values()}
    assert {stored.bits for stored in checkpoint.stored.values()} == {4, 8}
    assert groups == {32, None}
    for name, stored in checkpoint.stored.items():
        scale = stored.scale.repeat_interleave(stored.q.shape[1] // stored.scale.shape[1], 1)
        assert torch.equal(stored.q.float() * scale, checkpoint.tensors[name])


def test_a_model_says_which_layers_it_calls() -> None:
    skeleton = huggingface.skeleton(
        huggingface.config(huggingface.described(ssmc.load_model("demo").module) or {}, "demo")
    )
    called = called_linears(skeleton)
    assert "backbone.layers.0.mixer.in_proj" in called
    assert "backbone.layers.0.mixer.dt_proj" not in called  # its weight is read as a matrix
