"""The ranking: the operator that quantising spoils comes first, however the graph is cut."""

from __future__ import annotations

from typing import Any

import pytest

from ssmc.core import Graph
from ssmc.passes._formats import operators
from ssmc.recipe import make_recipe
from ssmc.tuning.sensitivity import By, measure, units

from .conftest import MakeTrials

FIRST: dict[By, str] = {"block": "layer.1", "operator": "layer.1.out_proj", "role": "out_proj"}


@pytest.mark.parametrize("leave_out", [False, True])
@pytest.mark.parametrize("by", FIRST)
def test_what_is_spoilt_comes_first(trials: MakeTrials, by: By, leave_out: bool) -> None:
    result = measure(trials(spoilt=True), by, leave_out=leave_out)
    first, second = result.rows[:2]
    assert first.unit == FIRST[by]
    if leave_out:
        assert first.score.kl < 0.1 * second.score.kl
    else:
        assert first.score.kl > 10 * second.score.kl
        assert first.score.kl == pytest.approx(result.everything.kl, rel=0.1)


def test_unspoilt_it_is_one_of_many(trials: MakeTrials) -> None:
    first, second = measure(trials(), "operator").rows[:2]
    assert first.score.kl < 10 * second.score.kl


@pytest.mark.parametrize("by", FIRST)
def test_units_are_all_operators_once(trials: MakeTrials, by: By) -> None:
    g = trials().graph
    found = [o for members in units(g, by).values() for o in members]
    assert sorted(o.address for o in found) == sorted(o.address for o in operators(g))
    sizes = {"block": 4, "operator": 14, "role": 8}
    assert len(units(g, by)) == sizes[by]


@pytest.mark.parametrize("leave_out", [False, True])
def test_a_variant_changes_the_unit_and_nothing_else(
    trials: MakeTrials, leave_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = trials()
    made: list[Any] = []
    score = tried.score
    monkeypatch.setattr(
        tried, "score", lambda o: (made.append(tried.variant(tuple(o))), score(o))[1]
    )
    measure(tried, "operator", leave_out=leave_out)
    names = [o.node.name for o in operators(tried.graph)]
    for name, variant in zip(names, made, strict=False):
        changed = {n for n in names if _reads(variant, n) != _reads(tried.graph, n)}
        assert changed == ({*names} - {name} if leave_out else {name})
    assert all(_reads(made[-1], n) != _reads(tried.graph, n) for n in names)


def _reads(g: Graph, name: str) -> list[str]:
    return [n.name for n in g.node(name).all_input_nodes]


@pytest.mark.parametrize("leave_out", [False, True])
def test_quantised_means_as_the_recipe_says(trials: MakeTrials, leave_out: bool) -> None:
    options = {"group": 8, "overrides": {"layer.0.in_proj": "w2a8", "scan": "float"}}
    recipe = make_recipe(passes=["absmax", {"quantise": options}])
    rows = measure(trials(recipe=recipe), "operator", leave_out=leave_out).rows
    assert rows[0].unit == "layer.0.in_proj"
    scans = [row.score.kl for row in rows if row.unit.endswith("scan")]
    everything = measure(trials(recipe=recipe), "block").everything.kl
    assert scans == [everything if leave_out else 0.0] * 2
