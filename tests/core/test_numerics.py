"""Signal-to-noise by block."""

from __future__ import annotations

import math

import pytest
import torch

from ssmc.core.numerics import EQUAL, block_numerics, compare_values
from ssmc.core.pipeline import signal_to_noise
from ssmc.errors import NumericsError

from .tiny import apply, context, graph

IDS = context().probe or ()


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_rows_are_blocks_worst_first(kind: str) -> None:
    g = graph(kind)
    apply(g, "fold-norm,fold-a-log,absmax")
    reference = g.copy()
    weight = next(n for n in g.nodes if n.target == "backbone.layers.1.mixer.out_proj.weight")
    g.set_param(weight, g.param(weight) * 1.5)
    first, second = block_numerics(g, reference, IDS)
    assert (first["block"], second["block"]) == (1, 0)
    assert first["output"] < 40
    assert second["output"] == EQUAL
    assert first["out_proj out"] == pytest.approx(-20 * math.log10(0.5), abs=1e-4)
    assert first["scan out"] == first["conv1d out"] == EQUAL


def test_values_are_compared_by_name() -> None:
    g = graph("mamba")
    apply(g, "absmax")
    reference = g.copy()
    apply(g, "quantise")
    name = "backbone_layers_0_mixer_u"
    seen = {}
    for key, run in (("new", g), ("old", reference)):
        run.watch(lambda n, v, key=key: seen.update({key: v}) if n.name == name else None, *IDS)
    ratio = compare_values(g, reference, {name}, IDS)[name]
    assert ratio == pytest.approx(signal_to_noise(seen["new"], seen["old"]))
    assert 15 < ratio < 80


def test_nan_is_not_taken_for_equality() -> None:
    reference = graph("mamba")
    g = reference.copy()
    weight = next(n for n in g.nodes if n.target == "backbone.layers.0.mixer.D")
    g.set_param(weight, torch.full_like(g.param(weight), float("nan")))
    with pytest.raises(NumericsError, match="node 'backbone_layers_0_add' holds NaN"):
        compare_values(g, reference, {"backbone_layers_0_add"}, IDS)
