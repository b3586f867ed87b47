"""The passes on a trained model: the embedded one, on a few short windows of its text."""

from __future__ import annotations

import json

import pytest
from core.tiny import apply

import ssmc
from ssmc.core import Context, Graph
from ssmc.corpus import read_texts, token_windows
from ssmc.demo import calibration_file


@pytest.fixture(scope="module")
def demo() -> tuple[Graph, Context]:
    """The graph, and 8 windows of 48 tokens of which one is the probe."""
    model = ssmc.load_model("demo")
    assert model.tokenizer is not None
    assert model.eos_token_id is not None
    texts = read_texts(calibration_file())[:24]
    windows = token_windows(model.tokenizer, texts, model.eos_token_id, 48, "demo")[:9]
    batches = [(part,) for part in windows[:8].split(4)]
    return ssmc.trace(model.module), Context(batches, (windows[8:],))


@pytest.fixture(scope="module")
def errors(demo: tuple[Graph, Context]) -> dict[str, float]:
    """The relative error of the probe's logits that quantising adds, by recipe."""
    graph, context = demo
    recipes = {
        "static": "absmax,quantise{granularity=tensor}",
        "quamba": "hadamard,percentile,quantise{granularity=tensor}",
        "free": "hadamard,percentile,quantise",
    }
    found = {}
    for name, passes in recipes.items():
        records = apply(graph.copy(), passes, context)
        exact = [r for r in records.values() if r.limit is not None and r.error is not None]
        assert all(r.error <= r.limit for r in exact), name  # type: ignore[operator]
        json.dumps([r.to_json() for r in records.values()], allow_nan=False)
        found[name] = records["quantise"].error or 0
    return found


def test_rotation_and_percentile_help(errors: dict[str, float]) -> None:
    assert errors["quamba"] < errors["static"] / 1.5, errors


def test_free_scales_help_more(errors: dict[str, float]) -> None:
    assert errors["free"] < errors["quamba"] / 1.5, errors
    assert errors["free"] < 0.1, errors


def test_residual_rotation_and_smoothing_stay_exact(demo: tuple[Graph, Context]) -> None:
    graph, context = demo
    records = apply(graph.copy(), "fold-norm,hadamard{residual=true},smooth", context)
    assert all((r.error or 0) < 1e-5 for r in records.values())
    assert len(records["hadamard"].matched) == len(graph.calls("ssmc::selective_scan")) + 1
