"""The table of published sizes, and models of random weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ssmc.bench import random_model
from ssmc.bench.random_model import compile_random, random_recipe
from ssmc.bench.sizes import SIZES, VOCABULARY, Size, find_size
from ssmc.errors import UsageError

PUBLISHED = {  # parameters in millions, as the models' names and papers round them
    "130m": 129.1, "370m": 371.5, "790m": 793.2, "1.4b": 1372.2, "2.8b": 2768.3,
    "mamba2-130m": 129.0, "mamba2-370m": 368.3, "mamba2-780m": 780.1, "mamba2-1.3b": 1343.7,
    "mamba2-2.7b": 2702.6,
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_parameters_of_the_published_models(name: str) -> None:
    module = find_size(name).module("meta")
    count = sum(parameter.numel() for parameter in module.parameters())
    assert count / 1e6 == pytest.approx(PUBLISHED[name], abs=0.05)


def test_unknown_size() -> None:
    with pytest.raises(UsageError, match="no published size '28b'") as caught:
        find_size("28b")
    assert "2.8b" in str(caught.value.hint)


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_random_weights_are_those_of_an_untrained_model(layer: str) -> None:
    torch.manual_seed(0)
    module = Size("small", layer, 64, 2).module("cpu")  # type: ignore[arg-type]
    embedding = module.get_input_embeddings()  # type: ignore[operator]
    assert embedding.weight is module.lm_head.weight
    assert embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    mixer = module.backbone.layers[0].mixer  # type: ignore[union-attr, index]
    assert mixer.in_proj.weight.abs().max() <= 64**-0.5
    bias = mixer.dt_proj.bias if layer == "Mamba1" else mixer.dt_bias
    steps = nn.functional.softplus(bias)
    assert (steps > 9e-4).all()
    assert (steps < 0.11).all()


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_compiled_random_model(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_model, "LENGTH", 8)
    size = Size("small", layer, 64, 2)  # type: ignore[arg-type]
    model = compile_random(size, random_recipe("w8a8", None, "cpu", 0), torch.device("cpu"))
    assert model.lowered.kept == []
    assert model.weight_bytes() < 1.2 * VOCABULARY * 64
    logits = model.session(2).prefill(torch.randint(0, VOCABULARY, (2, 5)))
    assert logits.shape == (2, VOCABULARY)


def test_scheme_of_a_random_model() -> None:
    with pytest.raises(UsageError, match="scheme 'w8a9'"):
        random_recipe("w8a9", None, "cpu", 0)
