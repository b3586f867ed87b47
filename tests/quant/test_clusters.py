"""Sorting and clustering: the cuts are the best there are, planted clusters are found."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch

from ssmc.quant.clusters import cut_channels, join_heads, sort_and_cluster


def cost(profile: torch.Tensor, cuts: tuple[int, ...]) -> float:
    ends = [0, *cuts, len(profile)]
    runs = [profile[a:b] for a, b in pairwise(ends)]
    return sum(len(run) * run.max().item() ** 2 for run in runs)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_no_cuts_are_better(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    profile = torch.rand(9, generator=generator, dtype=torch.float64).exp().pow(3).sort().values
    cuts = cut_channels(profile, count)
    assert len(cuts) == count - 1
    assert cuts == sorted(set(cuts))
    every = combinations(range(1, 9), count - 1)
    assert cost(profile, tuple(cuts)) == pytest.approx(min(cost(profile, c) for c in every))


def test_fewer_channels_than_runs() -> None:
    assert cut_channels(torch.tensor([1.0, 2.0]), 4) == [1]
    assert cut_channels(torch.tensor([3.0]), 4) == []


def test_heads_of_like_magnitude_are_joined_small_ones_first() -> None:
    shape = torch.linspace(0.5, 1.0, 5, dtype=torch.float64)
    size = torch.tensor([9.0, 3.0, 9.1, 1.0, 3.1, 1.1], dtype=torch.float64)
    assert join_heads(size[:, None] * shape, 3) == [[3, 5], [1, 4], [0, 2]]
    assert join_heads(size[:, None] * shape, 9) == [[3], [5], [1], [4], [0], [2]]


def test_order_and_clusters() -> None:
    maxima = torch.tensor([[8.0, 1.0, 9.0, 1.1], [0.2, 0.1, 0.1, 0.3], [1.0, 8.1, 1.0, 7.9]])
    order, clusters = sort_and_cluster(maxima, heads=2, channels=2)
    assert order.tolist() == [[5, 6, 4, 7], [8, 10, 11, 9], [1, 3, 0, 2]]
    assert clusters.tolist() == [[0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]


def test_equal_channels_stay_in_order() -> None:
    order, clusters = sort_and_cluster(torch.ones(3, 4), heads=2, channels=2)
    assert sorted(order.flatten().tolist()) == list(range(12))
    assert (order % 4).tolist() == [[0, 1, 2, 3]] * 3
    assert (clusters[:, 0] <= clusters[:, -1]).all()
    again, _ = sort_and_cluster(torch.ones(3, 4), heads=2, channels=2)
    assert torch.equal(order, again)
