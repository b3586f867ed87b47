"""Signal-to-noise by block."""

from __future__ import annotations

import math

import pytest
import torch

from ssmc.core.numerics import EQUAL, block_numerics, compare_values, operator_numerics
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


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_an_operators_own_error_is_without_those_before_it(kind: str) -> None:
    g = graph(kind)
    apply(g, "fold-norm,fold-a-log,absmax")
    reference = g.copy()
    spoilt = next(n for n in g.nodes if n.target == "backbone.layers.0.mixer.out_proj.weight")
    g.set_param(spoilt, g.param(spoilt) * 1.5)
    names = {n.name: f"{n.meta['layer']} {n.meta['role']}" for n in g.calls("ssmc::linear")
             if n.meta["role"] in ("in_proj", "out_proj")}  # fmt: skip
    first, *others = operator_numerics(g, reference, names, IDS)
    assert first["operator"] == "0 out_proj"
    assert first["own"] == first["output"] == pytest.approx(-20 * math.log10(0.5), abs=1e-4)
    assert {row["own"] for row in others} == {EQUAL}
    behind = {row["operator"]: row["output"] for row in others}
    assert behind["0 in_proj"] == EQUAL
    assert behind["1 in_proj"] < 60


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_an_operator_by_itself_is_the_graph_that_quantises_it_alone(kind: str) -> None:
    g = graph(kind)
    apply(g, "fold-norm,hadamard,fold-a-log,percentile")
    reference, alone = g.copy(), g.copy()
    apply(g, "quantise")
    name = "backbone_layers_1_mixer_out_proj"
    apply(alone, "percentile,quantise{overrides=*:float;layer.1.out_proj:w8a8}")
    (row,) = operator_numerics(g, reference, {name: "it"}, IDS)
    assert row["own"] == pytest.approx(compare_values(alone, reference, {name}, IDS)[name])
    assert row["own"] > row["output"] + 1
