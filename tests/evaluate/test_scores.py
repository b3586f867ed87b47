"""Scores of two models compared, with made-up numbers."""

from __future__ import annotations

import math

import pytest

from ssmc.evaluate.scores import Score


def score(*each: float) -> Score:
    return Score("task", "acc", sum(each) / len(each), len(each), True, each)


def test_the_error_of_a_mean() -> None:
    assert score(0, 1, 1, 0).error == pytest.approx(math.sqrt(1 / 3) / 2)
    assert score(1).error is None
    assert Score("task", "perplexity", 20.0, 4, False).error is None


def test_the_difference_is_taken_document_by_document() -> None:
    ours, theirs = score(0, 1, 1, 0), score(0, 1, 1, 1)
    difference, error = ours.difference(theirs)
    assert difference == -0.25
    assert error == pytest.approx(0.25)  # deviation 0.5 over the root of 4
    assert ours.difference(ours) == (0, 0)


def test_what_is_no_mean_has_a_difference_without_error() -> None:
    ours, theirs = (Score("task", "perplexity", v, 4, False) for v in (21.0, 20.0))
    assert ours.difference(theirs) == (1.0, None)
