"""Tiny models, calibrated, and one of their layers spoilt for quantising."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from core.tiny import VOCABULARY, WIDTH, calibration, language_model
from torch import Tensor, nn

from ssmc.compiler import Hooks, Prepared, Source, prepare
from ssmc.frontend import trace
from ssmc.recipe import Recipe, make_recipe
from ssmc.tuning.trials import Trials

MakeTrials = Callable[..., Trials]
RECIPE = make_recipe(passes="absmax,quantise{group=8}")


def windows(count: int = 3) -> Tensor:
    """Random tokens [count, 24]."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, VOCABULARY, (count, 24), generator=generator)


def spoil(model: nn.Module) -> nn.Module:
    """Give every row of the second out_proj a weight of 100, on a channel that is always zero.

    In float it changes nothing; in 8 bits a row it leaves nothing of the other weights.
    """
    mixer = model.get_submodule("backbone.layers.1.mixer")
    with torch.no_grad():
        mixer.get_parameter("in_proj.weight")[2 * WIDTH] = 0.0  # the gate of channel 0
        mixer.get_parameter("out_proj.weight")[:, 0] = 100.0
    return model


def calibrated(model: nn.Module, recipe: Recipe = RECIPE) -> Prepared:
    """The graph of a tiny model, calibrated on random tokens."""
    source = Source(trace(model), {"source": {}}, list(calibration()))
    return prepare(source, recipe, Hooks())


@pytest.fixture
def trials() -> MakeTrials:
    """`trials(spoilt=True)`: the trials of a tiny model."""

    def make(*, spoilt: bool = False, recipe: Recipe = RECIPE) -> Trials:
        model = language_model("mamba")
        return Trials(calibrated(spoil(model) if spoilt else model, recipe), recipe, windows())

    return make
