"""Runs of tokens that two texts have in common."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssmc.overlap import KEPT, RUN, from_text, run_hashes, shared, to_text


def text(n: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 5000, (n, length), generator=torch.Generator().manual_seed(seed))


def test_a_text_is_all_in_itself_wherever_its_windows_begin() -> None:
    known = text(1, 20_000, 0)
    hashes = run_hashes(known)
    assert shared(run_hashes(known[:, 137:]), hashes) == 1.0
    # Windows lose the runs across their borders, and no others.
    assert shared(run_hashes(known.view(40, 500)), hashes) == 1.0
    assert len(hashes) == pytest.approx((20_000 - RUN + 1) / KEPT, rel=0.2)


def test_another_text_is_not() -> None:
    assert shared(run_hashes(text(4, 5000, 1)), run_hashes(text(4, 5000, 2))) == 0.0


def test_half_of_a_text_is_about_half_in_it() -> None:
    known, other = text(1, 20_000, 3), text(1, 20_000, 4)
    mixed = torch.cat([known[:, :10_000], other[:, :10_000]], 1)
    assert shared(run_hashes(mixed), run_hashes(known)) == pytest.approx(0.5, abs=0.05)


def test_one_token_more_or_less_is_another_run() -> None:
    known = text(1, 3000, 5)
    changed = known.clone()
    changed[:, :: RUN - 1] += 1
    assert shared(run_hashes(changed), run_hashes(known)) == 0.0


def test_nothing_to_compare() -> None:
    short = text(5, RUN - 1, 6)
    assert len(run_hashes(short)) == 0
    assert shared(run_hashes(short), run_hashes(text(1, 3000, 7))) is None


@given(st.lists(st.integers(0, 2**64 - 1), max_size=20))
def test_hashes_come_back_from_text(numbers: list[int]) -> None:
    hashes = np.array(numbers, dtype=np.uint64)
    assert np.array_equal(from_text(to_text(hashes)), hashes)
