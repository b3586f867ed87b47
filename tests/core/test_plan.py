"""The plan: what is added, in which order, and which orders are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmc.core import Pass, find_pass, known_passes, make_plan
from ssmc.core.options import parse_passes
from ssmc.core.passes import STAGES
from ssmc.errors import UsageError

from .tiny import make_pass


def _plan(text: str) -> list[str]:
    return [p.name for p in make_plan(parse_passes(text))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("fold-a-log", ["fold-a-log"]),
        ("linears", ["ssm-sites", "linears"]),
        ("hadamard", ["ssm-sites", "linears", "hadamard"]),
        ("fold-norm,hadamard", ["ssm-sites", "linears", "fold-norm", "hadamard"]),
        ("percentile", ["ssm-sites", "linears", "percentile"]),
        ("quantise", ["ssm-sites", "linears", "fold-norm", "fold-a-log", "absmax", "quantise"]),
    ],
)
def test_needs_are_added_in_order_of_stages(text: str, expected: list[str]) -> None:
    assert _plan(text) == expected


def test_percentile_stands_in_for_absmax_and_hadamard_comes_after_fold_norm() -> None:
    expected = ["ssm-sites", "linears", "fold-norm", "hadamard", "fold-a-log", "percentile"]
    assert _plan("hadamard,percentile,quantise") == [*expected, "quantise"]


def test_two_passes_that_stand_in_for_one_another_are_refused() -> None:
    for text in ("absmax,percentile", "percentile{p=0.999},hadamard,absmax"):
        with pytest.raises(UsageError, match=r"(absmax|percentile) and (absmax|percentile)"):
            _plan(text)


def test_given_passes_keep_their_options() -> None:
    plan = make_plan(parse_passes("hadamard{block=8},quantise{head=false}"))
    assert {str(p) for p in plan} >= {"hadamard{block=8}", "quantise{head=false}", "absmax"}


@pytest.mark.parametrize("order", [["b", "a", "c"], ["c", "b", "a"], ["a", "c", "b"]])
def test_users_order_is_respected(order: list[str]) -> None:
    for name in order:
        make_pass(name)
    assert _plan(",".join(order)) == order


def test_after_orders_what_was_added_but_adds_nothing() -> None:
    make_pass("late", after=("early", "absent"), needs=("middle",))
    make_pass("middle")
    make_pass("early", after=("middle",))
    assert _plan("late") == ["middle", "late"]
    assert _plan("early,late") == ["middle", "early", "late"]


def test_provides_stands_in_wherever_it_is_asked_for() -> None:
    make_pass("asks", needs=("thing",))
    make_pass("thing")
    make_pass("other", provides=("thing",))
    assert _plan("asks") == ["thing", "asks"]
    assert _plan("other,asks") == ["other", "asks"]
    with pytest.raises(UsageError, match=r"other .* must run before asks"):
        _plan("asks,other")


IMPOSSIBLE = {
    "percentile,hadamard": "hadamard,percentile",
    "quantise,hadamard": "hadamard,quantise",
    "smooth,hadamard": "hadamard,smooth",
    "hadamard,fold-norm": "fold-norm,hadamard",
    "linears,ssm-sites": "ssm-sites,linears",
    "smooth,quantise,fold-a-log": "smooth,fold-a-log,quantise",
    "quantise{granularity=tensor},percentile{p=0.5},hadamard{block=4}": (
        "hadamard{block=4},percentile{p=0.5},quantise{granularity=tensor}"
    ),
}


@pytest.mark.parametrize("text", IMPOSSIBLE)
def test_impossible_order(text: str) -> None:
    with pytest.raises(UsageError, match="impossible order") as caught:
        _plan(text)
    assert caught.value.hint == f"write --passes {IMPOSSIBLE[text]}"
    assert caught.value.exit_code == 2


def test_impossible_order_names_both_and_their_stages() -> None:
    with pytest.raises(UsageError) as caught:
        _plan("percentile,hadamard")
    expected = "impossible order: hadamard (rewrite) must run before percentile (calibrate)"
    assert str(caught.value) == expected


def test_order_through_a_pass_that_was_added() -> None:
    make_pass("last", needs=("between",))
    make_pass("between", after=("first",))
    make_pass("first")
    with pytest.raises(UsageError) as caught:
        _plan("last,first")
    assert caught.value.hint == "write --passes first,last"


BUILT_IN = ["fold-a-log", "fold-norm", "hadamard", "linears", "percentile", "quantise"]


@given(st.permutations([*BUILT_IN, "smooth", "ssm-sites"]), st.integers(0, 9))
def test_every_order_is_planned_or_answered_with_one_that_can_be(
    order: list[str], count: int
) -> None:
    wanted = order[:count]
    try:
        plan = _plan(",".join(wanted))
    except UsageError as error:
        hint = str(error.hint).removeprefix("write --passes ")
        assert sorted(hint.split(",")) == sorted(wanted)
        plan, wanted = _plan(hint), hint.split(",")
    assert [name for name in plan if name in wanted] == wanted
    assert len(set(plan)) == len(plan)
    _check_sound([find_pass(name) for name in plan])


def _check_sound(plan: list[type[Pass]]) -> None:
    stages = [STAGES.index(p.stage) for p in plan]
    assert stages == sorted(stages)
    for i, p in enumerate(plan):
        before = {name for q in plan[:i] for name in (q.name, *q.provides)}
        later = {q.name for q in plan[i:]}
        assert set(p.needs) <= before
        assert not set(p.after) & later


def test_named_twice() -> None:
    with pytest.raises(UsageError, match="pass 'hadamard' is named twice"):
        _plan("hadamard,smooth,hadamard{block=8}")


def test_circle() -> None:
    make_pass("chicken", needs=("egg",))
    make_pass("egg", needs=("hen",))
    make_pass("hen", after=("chicken",))
    with pytest.raises(UsageError, match=r"circle: .*egg") as caught:
        _plan("chicken")
    assert {"chicken", "egg", "hen"} <= set(str(caught.value).replace(":", "").split())


def test_need_of_an_earlier_stage_that_needs_a_later_one_is_a_circle() -> None:
    make_pass("measure", stage="analyse", needs=("quantise",))
    with pytest.raises(UsageError, match="circle"):
        _plan("measure")


def test_unknown_need() -> None:
    make_pass("lonely", needs=("fold-nrom",))
    with pytest.raises(UsageError, match="unknown pass 'fold-nrom'") as caught:
        _plan("lonely")
    assert "fold-norm" in str(caught.value.hint)


@pytest.mark.parametrize("name", known_passes())
def test_built_in_passes_refer_to_passes_that_exist(name: str) -> None:
    p = find_pass(name)
    provided = {n for q in map(find_pass, known_passes()) for n in (q.name, *q.provides)}
    assert {*p.after, *p.needs, *p.preserves} <= provided
    assert all(find_pass(n).stage == "analyse" for n in p.preserves)
    assert p.name == name
    _check_sound([type(q) for q in make_plan([p()])])
