"""The search for bits: it keeps to its bound, spares what is spoilt, and ends within its budget."""

from __future__ import annotations

import pytest

from ssmc.core.dialect import operands
from ssmc.errors import UsageError
from ssmc.passes._formats import choose, operators
from ssmc.recipe import make_recipe
from ssmc.tuning.search import Limits, search, shared_units
from ssmc.tuning.trials import Trials

from .conftest import MakeTrials


def _loss(trials: Trials, form: str) -> float:
    return trials.score((f"*:{form}",)).loss


def test_units_are_what_reads_one_weight(trials: MakeTrials) -> None:
    units = shared_units(trials().graph)
    assert {u.name for u in units if len(u.operators) > 1} == {"embedding, head"}
    assert [u.size for u in units] == sorted((u.size for u in units), reverse=True)
    assert units[-1].size == 0  # a scan has no weight


def test_a_bound_between_takes_a_part_of_the_changes(trials: MakeTrials) -> None:
    tried = trials()
    low, high = _loss(tried, "w8a8"), _loss(tried, "w4a16")
    bound = low + 0.5 * (high - low)
    found = search(tried, Limits(bound, ("w8a8", "w4a16")))
    assert found.met
    assert low < found.score.loss <= bound
    widest = search(tried, Limits(1e9, ("w8a8", "w4a16")))
    assert found.start.bytes > found.score.bytes > widest.score.bytes
    assert {*found.formats.values()} == {"w8a8", "w4a16"}
    assert found.score == tried.score(found.overrides)


def test_formats_are_those_of_the_overrides(trials: MakeTrials) -> None:
    tried = trials()
    found = search(tried, Limits(_loss(tried, "w4a16"), ("w8a8", "w4a16")))
    chosen = choose(found.overrides, tried.graph)
    for operator in operators(tried.graph):
        assert found.formats[operator.address] == chosen[operator.node].format


def test_a_wide_bound_takes_all_that_saves(trials: MakeTrials) -> None:
    tried = trials()
    found = search(tried, Limits(1e9, ("w8a8", "w4a16")))
    for unit in (u for u in shared_units(tried.graph) if u.size):
        (form,) = {found.formats[o.address] for o in unit.operators}
        saves = tried.bytes(("*:w8a8", *(f"{o.address}:w4a16" for o in unit.operators)))
        assert (form == "w4a16") == (saves < found.start.bytes)


def test_a_tight_bound_leaves_what_would_go_beyond_it(trials: MakeTrials) -> None:
    tried = trials()
    bound = _loss(tried, "w8a8") * 1.0001
    found = search(tried, Limits(bound, ("w8a8", "w2a16")))
    assert found.met
    assert found.score.loss <= bound
    beyond = [
        unit
        for unit in shared_units(tried.graph)
        if tried.score(("*:w8a8", *(f"{o.address}:w2a16" for o in unit.operators))).loss > bound
    ]
    assert len(beyond) == 5  # in_proj and out_proj of two layers, and the embedding with the head
    assert {found.formats[o.address] for unit in beyond for o in unit.operators} == {"w8a8"}


def test_a_start_that_fails_is_repaired_where_it_is_spoilt(trials: MakeTrials) -> None:
    whole, tried = trials(), trials(spoilt=True)
    bound = 1.5 * _loss(whole, "w8a8")
    assert _loss(tried, "w8a8") > 10 * bound
    found = search(tried, Limits(bound, ("w8a8", "float")))
    assert found.met
    assert found.score.loss <= bound
    assert found.formats["layer.1.out_proj"] == "float"
    assert list(found.formats.values()).count("float") < len(found.formats) / 2


def test_a_bound_of_nothing_needs_float(trials: MakeTrials) -> None:
    found = search(trials(), Limits(0.0, ("w8a8", "float")))
    assert found.met
    assert found.score.loss == 0.0
    assert {*found.formats.values()} == {"float"}


def test_a_bound_that_cannot_be_met_says_what_was_reached(trials: MakeTrials) -> None:
    tried = trials()
    found = search(tried, Limits(1e-9, ("w4a8", "w8a8")))
    assert not found.met
    assert 0 < found.score.loss < found.start.loss


@pytest.mark.parametrize("bound", [0.0, 1e9])
def test_the_budget_is_kept_to(trials: MakeTrials, bound: float) -> None:
    tried = trials()
    found = search(tried, Limits(bound, ("w8a8", "w4a8", "w4a16", "float"), evaluations=6))
    assert found.met
    assert found.evaluations == tried.count <= 7


def test_the_same_trials_give_the_same_choice(trials: MakeTrials) -> None:
    limits = Limits(0.01, ("w8a8", "w4a8", "w4a16", "float"))
    assert search(trials(), limits) == search(trials(), limits)


@pytest.mark.parametrize("candidates", [("w9a8",), ("default",), ("",), ()])
def test_candidates_are_formats(candidates: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="candidate"):
        Limits(0.01, candidates)


def test_what_the_recipe_says_stays(trials: MakeTrials) -> None:
    options = {"group": 8, "overrides": {"layer.0.in_proj": "float"}}
    tried = trials(recipe=make_recipe(passes=["absmax", {"quantise": options}]))
    found = search(tried, Limits(1e9, ("w8a8", "w4a16")))
    assert found.formats["layer.0.in_proj"] == "float"
    assert found.formats["layer.1.in_proj"] == "w4a16"
    variant = tried.variant(found.overrides)
    name = "backbone_layers_0_mixer_in_proj"
    assert operands(variant.node(name))["weight"].op == "get_attr"
