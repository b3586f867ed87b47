"""Rails: every value reaches each of its readers, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from ssmc.inspection.moments import Call
from ssmc.inspection.rails import Part, Row, rows


def call(name: str, inputs: Sequence[str]) -> Call:
    return Call(name, "op", 0, "", "", "", tuple(inputs), (), (name,))


@st.composite
def layers(draw: st.DrawFn) -> list[Call]:
    """Calls that read any earlier ones, or values from outside."""
    count = draw(st.integers(1, 12))
    found = []
    for i in range(count):
        known = [f"outside{k}" for k in range(2)] + [f"c{k}" for k in range(i)]
        found.append(call(f"c{i}", draw(st.lists(st.sampled_from(known), max_size=3, unique=True))))
    return found


def followed(found: Sequence[Row]) -> set[tuple[str, str]]:
    """Which rows the lines join: by following each of them down, as an eye does."""
    joined = set()
    for i, row in enumerate(found):
        if row.below:
            assert found[i + 1].above
            joined.add((row.name, found[i + 1].name))
        for rail, part in enumerate(row.rails):
            if part is Part.BEGIN:
                joined |= {(row.name, reader) for reader in down(found, i + 1, rail)}
    return joined


def down(found: Sequence[Row], start: int, rail: int) -> list[str]:
    readers = []
    for row in found[start:]:
        part = row.rails[rail]
        assert part in (Part.PASS, Part.BRANCH, Part.END)
        if part is not Part.PASS:
            readers.append(row.name)
        if part is Part.END:
            return readers
    raise AssertionError("a rail without an end")


@given(layers())
def test_lines_join_what_the_calls_read(calls: list[Call]) -> None:
    expected = {(name, c.name) for c in calls for name in c.inputs}
    assert followed(rows(calls)) == expected


def test_a_chain_needs_no_rails_and_a_value_read_twice_needs_one() -> None:
    chain = rows([call("a", []), call("b", ["a"]), call("c", ["b"])])
    assert [row.rails for row in chain] == [[], [], []]
    fork = rows([call("a", []), call("b", ["a"]), call("c", ["a", "b"])])
    assert [row.rails for row in fork] == [[Part.BEGIN], [Part.BRANCH], [Part.END]]
    assert (fork[1].below, fork[2].above) == (True, True)


def test_states_have_no_row_and_other_values_from_outside_do() -> None:
    found = rows([call("a", ["l0_ssm", "before"])], states=["l0_ssm"])
    assert [row.name for row in found] == ["before", "a"]
