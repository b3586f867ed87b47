"""Ranges: against a direct computation over the calibration batches."""

from __future__ import annotations

import pytest
import torch
from core.tiny import KINDS, apply, calibration, context, graph, values

from ssmc.core import Context, Graph
from ssmc.errors import NumericsError
from ssmc.passes.ssm_sites import find_site

from .quantised import raw_value, watched

SCANS = ("ssmc::selective_scan", "ssmc::ssd_scan")


def _measured(kind: str, passes: str) -> Graph:
    g = graph(kind)
    apply(g, passes)
    return g


def _inputs(g: Graph) -> set[str]:
    """The names of the SSM inputs u."""
    return {find_site(n).u.name for name in SCANS for n in g.calls(name)}


@pytest.mark.parametrize("kind", KINDS)
def test_absmax_of_every_point(kind: str) -> None:
    g = _measured(kind, "hadamard,absmax")
    measured = values(g, *g.ranges)
    for name, observer in g.ranges.items():
        magnitude = measured[name].abs()
        channel = magnitude.flatten(0, 2).amax(0).flatten()
        assert torch.equal(observer.channel(), channel), name
        assert torch.equal(observer.tensor(), magnitude.max()), name


@pytest.mark.parametrize("kind", KINDS)
def test_points_are_what_scans_convolutions_and_projections_read(kind: str) -> None:
    g = _measured(kind, "absmax")
    sites = [find_site(n) for name in SCANS for n in g.calls(name)]
    expected = {v.name for site in sites for v in site.values().values()}
    expected |= {n.args[0].name for n in g.calls("ssmc::linear")}  # type: ignore[union-attr]
    assert set(g.ranges) == expected
    assert len(sites) == 2
    assert all(len(site.values()) == 7 for site in sites)


@pytest.mark.parametrize("kind", KINDS)
def test_percentile_clips_only_u(kind: str) -> None:
    p = 0.95
    absmax, percentile = (_measured(kind, passes) for passes in ("absmax", f"percentile{{p={p}}}"))
    assert list(absmax.ranges) == list(percentile.ranges)
    us = _inputs(absmax)
    measured = values(absmax, *us)
    for name, observer in percentile.ranges.items():
        if name not in us:
            assert torch.equal(observer.channel(), absmax.ranges[name].channel())
            continue
        magnitude = measured[name].abs().flatten(0, 2).flatten(1).double()
        expected = torch.quantile(magnitude, p, dim=0).float()
        torch.testing.assert_close(observer.channel(), expected, rtol=1e-6, atol=0)
        expected = torch.quantile(magnitude.flatten(), p).float()
        torch.testing.assert_close(observer.tensor(), expected, rtol=1e-6, atol=0)
        assert (observer.channel() < absmax.ranges[name].channel()).all()


def test_percentile_of_one_is_absmax() -> None:
    absmax, percentile = (_measured("mamba", passes) for passes in ("absmax", "percentile{p=1}"))
    for name, observer in percentile.ranges.items():
        assert torch.equal(observer.channel(), absmax.ranges[name].channel())


def test_ranges_do_not_depend_on_batching() -> None:
    together = torch.cat([batch for (batch,) in calibration()])
    results = []
    for size in (1, 5, 12):
        g = graph("mamba")
        batches = [(part,) for part in together.split(size)]
        apply(g, "percentile{p=0.9}", Context(batches, batches[0]))
        results.append({name: observer.tensor() for name, observer in g.ranges.items()})
    for result in results[1:]:
        for name, value in result.items():
            torch.testing.assert_close(value, results[0][name], rtol=1e-6, atol=0)


def test_calibration_measures_and_changes_nothing() -> None:
    g = graph("mamba2")
    record = apply(g, "percentile")["percentile"]
    assert record.diff.params == {}
    assert record.diff.added == record.diff.removed == []
    assert record.matched == list(g.ranges)
    assert record.error == 0


@pytest.mark.parametrize("name", ["absmax", "percentile"])
def test_overflow_in_an_activation_is_named(name: str) -> None:
    g = graph("mamba")
    node = next(n for n in g.nodes if n.target == "backbone.layers.1.mixer.conv1d.bias")
    bias = g.param(node).clone()
    bias[4] = 3e38
    g.set_param(node, bias)
    u = g.calls("ssmc::selective_scan")[1].args[0].name  # type: ignore[union-attr]
    inputs = context()
    inputs.probe = None
    with pytest.raises(NumericsError) as caught:
        apply(g, name, inputs)
    assert str(caught.value).startswith(f"pass {name}: node 'backbone_layers_1_mixer")
    assert u not in str(caught.value)


def test_clipping_a_rare_peak_of_u_saves_the_other_values() -> None:
    errors = {}
    for calibrate in ("absmax", "percentile{p=0.9998}"):
        g = _plant_rare_peak()
        batches = [*calibration(), (torch.tensor([[3, 127, 5, 6]]),)]
        given = Context(list(batches), context().probe)
        apply(g, f"{calibrate},quantise{{granularity=tensor}}", given)
        u = g.calls("ssmc::selective_scan")[0].args[0]
        raw, rounded = watched(g, raw_value(u), u)
        errors[calibrate] = ((rounded - raw).norm() / raw.norm()).item()
    assert errors["percentile{p=0.9998}"] < errors["absmax"] / 5, errors


def _plant_rare_peak() -> Graph:
    """Residual channel 0 belongs to token 127 alone, and drives channel 2 of u very high."""
    g = graph("mamba")
    for node in [n for n in g.nodes if n.op == "get_attr"]:
        value = g.param(node).clone()
        if node.target == "backbone.embeddings.weight":
            value[:, 0] = 0
            value[127] = 0
            value[127, 0] = 5
        elif str(node.target).endswith("0.mixer.in_proj.weight"):
            value[2, 0] = 5
        elif str(node.target).endswith("0.mixer.conv1d.weight"):
            value[2] = 4
        g.set_param(node, value)
    return g
