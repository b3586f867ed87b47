"""The variance of states against what the weights predict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from core.tiny import KINDS, apply, context, error, graph

import ssmc
from ssmc.core import Context, Graph
from ssmc.core.dialect import operands
from ssmc.corpus import read_texts, token_windows
from ssmc.demo import calibration_file
from ssmc.errors import UsageError
from ssmc.passes._rows import rows_behind
from ssmc.passes.state_variance import Fit, StateVariance, measure_variance

FindPath = Callable[[str], Path]


def in_the_weights(g: Graph, spread: float = 3.0) -> None:
    """Give the rows of x and B norms of many sizes, and all channels and places the same decay."""
    for scan in [*g.calls("ssmc::selective_scan"), *g.calls("ssmc::ssd_scan")]:
        args = operands(scan)
        for value in (args.get("u") or args["x"], args["B"]):
            rows = rows_behind(value)
            assert rows is not None
            weight = g.param(operands(rows.linear)["weight"]).clone()
            size = torch.logspace(-spread / 2, spread / 2, rows.stop - rows.start)
            part = weight[rows.start : rows.stop]
            part *= (size[torch.randperm(len(size))] / part.norm(dim=1))[:, None]
            g.set_param(operands(rows.linear)["weight"], weight)
        dt = rows_behind(args["dt"])
        assert dt is not None
        weight = g.param(operands(dt.linear)["weight"]).clone()
        weight[dt.start : dt.stop] = 0
        g.set_param(operands(dt.linear)["weight"], weight)
        g.set_param(args["dt_bias"], torch.zeros_like(g.param(args["dt_bias"])))
    for name in [n for n in g.params() if n.endswith("A_log")]:
        node = next(n for n in g.nodes if n.target == name)
        g.set_param(node, torch.zeros_like(g.param(node)))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_many_sizes_show_in_the_states(kind: str) -> None:
    g = graph(kind)
    in_the_weights(g)
    record = apply(g, "state-variance{stride=5}")["state-variance"]
    assert len(record.matched) == len(record.notes) == 2
    for found in g.facts["state-variance"]:
        assert found.channels > 0.9, found
        assert found.places > 0.7, found
        assert found.values > 0.8, found
        assert found.separable > found.values, found


def test_variance_is_that_of_the_states_in_all_batches() -> None:
    g = graph("mamba")
    found = measure_variance(g, {"l1_ssm"}, 16, context())["l1_ssm"]
    states = []
    for (ids,) in context().calibration:
        _, first = g(ids[:, :16])
        states += [first["l1_ssm"], g(ids[:, 16:], states=first)[1]["l1_ssm"]]
    assert error(found, torch.cat(states).double().var(0, correction=0)) < 1e-6


def test_rows_are_those_of_the_projection() -> None:
    g = graph("mamba2")
    apply(g, "ssm-sites")
    (site, _) = g.facts["ssm-sites"]
    inner, rank, heads = 80, 8, 10
    expected = {"u": (inner, 2 * inner), "B": (2 * inner, 2 * inner + rank)}
    expected["dt"] = (2 * inner + 2 * rank, 2 * inner + 2 * rank + heads)
    expected["z"] = (0, inner)
    for name, (start, stop) in expected.items():
        rows = rows_behind(getattr(site, name))
        assert rows is not None
        assert (rows.linear, rows.start, rows.stop) == (site.in_proj, start, stop), name
    assert rows_behind(g.calls("ssmc::embedding")[0]) is None


def test_refuses() -> None:
    with pytest.raises(UsageError, match="stride"):
        StateVariance(stride=0)


# -- trained models ---------------------------------------------------------------------------


def fits(name: str) -> list[Fit]:
    model = ssmc.load_model(name)
    g = ssmc.trace(model.module)
    assert model.tokenizer is not None
    assert model.eos_token_id is not None
    texts = read_texts(calibration_file())[:16]
    windows = token_windows(model.tokenizer, texts, model.eos_token_id, 128, "demo")[:4]
    apply(g, "state-variance", Context([(windows,)]))
    found: list[Fit] = g.facts["state-variance"]
    return found


def test_of_a_trained_model() -> None:
    found = fits("demo")
    assert [f.layer for f in found] == list(range(8))
    # Trained, the places that decay slowest have the largest states, not the largest rows.
    assert all(f.places < 0 for f in found), found
    assert all(f.separable > 0.6 for f in found), found


def test_of_a_trained_model_with_heads(shared_model: FindPath) -> None:
    found = fits(str(shared_model("mamba2-6m")))
    assert len(found) == 8
    assert all(f.separable > 0.6 > abs(f.values) for f in found), found
