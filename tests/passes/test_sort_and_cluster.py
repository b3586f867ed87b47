"""Sort-and-cluster: the same function with channels in order, and scales that clusters share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from core.tiny import apply, error, graph, logits, values

from ssmc.compiler import Hooks, make_context, read_source
from ssmc.core import Graph
from ssmc.core.dialect import operands
from ssmc.errors import UsageError
from ssmc.passes._qdq import _shared
from ssmc.quant.formats import dequantize_tensor, quantize_tensor, scale_for
from ssmc.recipe import make_recipe

FindPath = Callable[[str], Path]
GROUPED = {"n_groups": 2, "num_heads": 8, "head_dim": 10}
SCAN = "ssmc::ssd_scan"
PER_TENSOR = "absmax,quantise{granularity=tensor}"


def inputs(g: Graph) -> list[str]:
    return [operands(scan)["x"].name for scan in g.calls(SCAN)]


def uneven(**options: Any) -> Graph:
    """A graph in whose scans a few channels, here and there, are many times as large as others."""
    g = graph("mamba2", **options)
    for conv in g.calls("ssmc::causal_conv1d"):
        for name in ("weight", "bias"):
            param = operands(conv)[name]
            value = g.param(param).clone()
            value[:80:7] *= 40
            value[3:80:11] *= 9
            g.set_param(param, value)
    return g


@pytest.mark.parametrize("options", [{}, GROUPED], ids=["one group", "two groups"])
def test_the_same_function_with_channels_sorted(options: dict[str, Any]) -> None:
    g = uneven(**options)
    expected, before = logits(g), values(g, *inputs(g))
    record = apply(g, "sort-and-cluster")["sort-and-cluster"]
    assert record.matched == [scan.name for scan in g.calls(SCAN)]
    assert 0 < error(logits(g), expected) < 2e-6
    for name, after in values(g, *inputs(g)).items():
        maxima = after.abs().flatten(0, 2).amax(0)
        assert (maxima.diff(dim=1) >= 0).all()
        old = before[name].abs().flatten(0, 2).amax(0)
        groups = options.get("n_groups", 1)
        parts = zip(maxima.chunk(groups), old.chunk(groups), strict=True)
        for new, original in parts:  # no channel leaves its SSD group
            torch.testing.assert_close(
                new.flatten().sort().values, original.flatten().sort().values
            )


def found_clusters(g: Graph) -> dict[str, torch.Tensor]:
    return {n.name: n.meta["clusters"] for n in g.nodes if "clusters" in n.meta}


@pytest.mark.parametrize("options", [{}, GROUPED], ids=["one group", "two groups"])
def test_clusters_share_a_scale(options: dict[str, Any]) -> None:
    g = uneven(**options)
    apply(g, "sort-and-cluster{heads=2,channels=3},absmax")
    clusters = found_clusters(g)
    plain = values(g, *clusters)
    apply(g, PER_TENSOR)
    scales = {n.args[0].name: g.param(n.args[1]) for n in g.calls("ssmc::quantize")}  # type: ignore[union-attr, arg-type]
    for name, labels in clusters.items():
        maxima = plain[name].abs().flatten(0, 2).amax(0)
        for label in labels.unique():
            (scale,) = scales[name][labels == label].unique()
            assert scale == scale_for(maxima[labels == label].max())
    groups = options.get("n_groups", 1)
    of_x = [labels for labels in clusters.values() if labels.shape[1] != 8 or groups == 1]
    assert [len(labels.unique()) for labels in of_x] == [groups * 2 * 3] * 2
    assert len(clusters) == 2 * (3 if groups > 1 else 1)  # B and C of each group, where several


def rounding_error(g: Graph) -> float:
    """The mean relative error of the channels of the scans' inputs that rounding makes."""
    errors = []
    found = values(g, *inputs(g))
    apply(g, PER_TENSOR)
    for n in g.calls("ssmc::quantize"):
        if n.args[0].name in found:  # type: ignore[union-attr]
            x, scale = found[n.args[0].name], g.param(n.args[1])  # type: ignore[union-attr, arg-type]
            rounded = dequantize_tensor(quantize_tensor(x, scale), scale)
            errors.append((rounded - x).flatten(0, 2).norm(dim=0) / x.flatten(0, 2).norm(dim=0))
    return torch.stack(errors).mean().item()


def test_rounding_errs_less_than_with_one_scale() -> None:
    plain, clustered = uneven(), uneven()
    apply(clustered, "sort-and-cluster")
    assert rounding_error(clustered) < 0.5 * rounding_error(plain)


@pytest.mark.slow
def test_a_trained_model_comes_near_scales_by_the_channel(
    shared_model: FindPath, shared_data: FindPath
) -> None:
    """The figures in docs/accuracy.md: the error of x by rounding, layer by layer."""
    model = str(shared_model("mamba2-6m"))
    source, held_out = (
        read_source(model, make_recipe(calibration=str(shared_data(file)), samples=samples))
        for file, samples in (("calib512.jsonl", 16), ("test.jsonl", 4))
    )
    errors = {}
    for passes in ("", "sort-and-cluster"):
        g = source.graph.copy()
        apply(g, f"{passes},absmax".lstrip(","), make_context(source, make_recipe(), Hooks()))
        names, clusters = inputs(g), found_clusters(g)
        seen: dict[str, torch.Tensor] = {}
        g.watch(lambda n, v, seen=seen: seen.update({n.name: v}), *held_out.calibration[0])
        for name in names:
            x, largest = seen[name], g.ranges[name].channel().view(seen[name].shape[2:])
            for kind, shared in (
                ("tensor", torch.zeros(x.shape[2:], dtype=torch.long)),
                ("cluster", clusters.get(name)),
                ("channel", torch.arange(largest.numel()).view(x.shape[2:])),
            ):
                if shared is not None and (kind == "cluster" or not passes):
                    scale = scale_for(_shared(largest.flatten(), shared))
                    rounded = dequantize_tensor(quantize_tensor(x, scale), scale)
                    errors.setdefault(kind, []).append(error(rounded, x))
    print({kind: [f"{100 * e:.2f} %" for e in each] for kind, each in errors.items()})
    tensor, cluster, channel = (torch.tensor(errors[k]) for k in ("tensor", "cluster", "channel"))
    assert len(cluster) == 8
    assert (cluster < 0.6 * tensor).all()
    assert (cluster < 1.15 * channel).all()


def test_scales_by_the_channel_need_no_clusters() -> None:
    g = uneven()
    names = inputs(g)
    apply(g, "sort-and-cluster,absmax,quantise")
    scales = {n.args[0].name: g.param(n.args[1]) for n in g.calls("ssmc::quantize")}  # type: ignore[union-attr, arg-type]
    assert all(len(scales[name].unique()) > 16 for name in names)


def test_before_a_rotation_and_not_behind_it() -> None:
    g = graph("mamba2")
    expected = logits(g)
    apply(g, "sort-and-cluster,hadamard{residual=true}")
    assert error(logits(g), expected) < 1e-5
    with pytest.raises(UsageError, match="impossible order"):
        apply(graph("mamba2"), "hadamard,sort-and-cluster")


def test_mamba_has_no_heads() -> None:
    g = graph("mamba")
    record = apply(g, "sort-and-cluster")["sort-and-cluster"]
    assert record.matched == []
    reason = "its scan has no heads: each channel has a step of its own"
    assert [s["reason"] for s in record.skipped] == [reason] * 2


def _shared_norm(g: Graph) -> str:
    one, other = g.calls("ssmc::rms_norm_gated")
    other.args = (*other.args[:2], one.args[2], *other.args[3:])
    return "is no parameter of its own"


def _small_groups(g: Graph) -> str:
    for norm in g.calls("ssmc::rms_norm_gated"):
        norm.args = (*norm.args[:4], 8, False)
    return "its norm has groups of 8 channels, smaller than those of the scan"


def _flipped_gate(g: Graph) -> str:
    for norm in g.calls("ssmc::rms_norm_gated"):
        z = operands(norm)["gate"]
        with g.before(norm):
            norm.replace_input_with(z, g.call("flip", z, [-1], like=z, suffix="flipped"))
    return "is not only views of"


def _read_twice(g: Graph) -> str:
    for norm in g.calls("ssmc::rms_norm_gated"):
        (out_proj,) = norm.users
        with g.after(out_proj):
            mean = g.call("mean", norm, -1, True, like=norm, suffix="mean")
        with g.after(mean):
            total = g.call("add", out_proj, mean, like=norm, suffix="more")
        g.replace(out_proj, total)
    return "has another reader"


def _rotated(g: Graph) -> str:
    apply(g, "hadamard")
    return "lies between its norm and out_proj"


CHANGES = [_shared_norm, _small_groups, _flipped_gate, _read_twice, _rotated]


@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_be_reordered_is_left_with_a_reason(change: Any) -> None:
    g = graph("mamba2")
    reason = change(g)
    g.finish()
    expected = logits(g)
    record = apply(g, "sort-and-cluster")["sort-and-cluster"]
    assert record.matched == []
    assert len(record.skipped) == 2
    assert all(reason in s["reason"] for s in record.skipped)
    assert torch.allclose(logits(g), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("option", ["heads", "channels"])
def test_no_clusters_at_all_is_refused(option: str) -> None:
    with pytest.raises(UsageError, match=f"{option} is at least 1"):
        apply(graph("mamba2"), f"sort-and-cluster{{{option}=0}}")
