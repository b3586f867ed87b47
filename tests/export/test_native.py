"""Where a native program's results are put: places that are free when they are needed."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from ssmc.export.native import ALIGNMENT, Room, lengths, pieces_of, place_rooms

SPANS = st.lists(
    st.tuples(st.integers(1, 5000), st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=40
)


@given(SPANS)
def test_rooms_that_are_needed_together_lie_apart(spans: list[tuple[int, int, int]]) -> None:
    rooms = [Room(0, size, first, first + more) for size, first, more in spans]
    total = place_rooms(rooms)
    for i, one in enumerate(rooms):
        assert one.offset % ALIGNMENT == 0
        assert one.offset + one.size <= total
        for other in rooms[:i]:
            if one.first <= other.last and other.first <= one.last:
                assert one.offset + one.size <= other.offset or (
                    other.offset + other.size <= one.offset
                )


def test_rooms_of_a_chain_take_turns() -> None:
    rooms = [Room(0, 1000, i, i + 1) for i in range(50)]  # each is read by the next launch
    random.Random(0).shuffle(rooms)
    assert place_rooms(rooms) == 2 * 1024


def test_pieces_add_up() -> None:
    for length in (1, 15, 16, 17, 511, 512, 1000):
        assert sum(pieces_of(length)) == length
        assert set(pieces_of(length)) <= set(lengths())
