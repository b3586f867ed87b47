"""Sampling: the processors are those of transformers, draws are seeded and of their row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssmc.errors import UsageError
from ssmc.runtime.sampling import Sampler, Sampling, draw

CPU = torch.device("cpu")


def logits(batch: int = 4, vocabulary: int = 300) -> Tensor:
    return 3 * torch.randn(batch, vocabulary)


# -- processors -------------------------------------------------------------------------------


def by_transformers(sampling: Sampling, context: Tensor, scores: Tensor) -> Tensor:
    """Scores as transformers' own processors make them, in the order of its `generate`."""
    from transformers.generation import logits_process as hf

    processors = hf.LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(hf.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        processors.append(hf.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(hf.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        processors.append(hf.MinPLogitsWarper(sampling.min_p))
    return processors(context, scores.clone())


def seen(context: Tensor, scores: Tensor) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, context, True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_k": 1000},
        {"top_p": 0.9},
        {"top_p": 1e-6},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {
            "temperature": 0.7,
            "top_k": 40,
            "top_p": 0.95,
            "min_p": 0.02,
            "repetition_penalty": 1.2,
        },
    ],
)
def test_the_scores_are_those_of_transformers(options: dict[str, Any]) -> None:
    sampling = Sampling(**{"temperature": 1.0, **options})
    scores, context = logits(), torch.randint(0, 300, (4, 50))
    mask = seen(context, scores) if sampling.repetition_penalty != 1 else None
    found = sampling.scores(scores, mask)
    assert torch.equal(found, by_transformers(sampling, context, scores))
    assert bool(found.isfinite().any(-1).all())


def test_greedy_takes_nothing_but_the_penalty_into_account() -> None:
    scores = torch.tensor([[2.0, 1.9, -3.0]])
    mask = torch.tensor([[True, False, True]])
    options = {"top_k": 1, "top_p": 0.5, "min_p": 0.5}
    assert Sampling(**options).scores(scores) is scores  # type: ignore[arg-type]
    found = Sampling(repetition_penalty=2.0, **options).scores(scores, mask)  # type: ignore[arg-type]
    assert found.tolist() == [[1.0, pytest.approx(1.9), -6.0]]


def test_the_penalty_is_for_the_prompt_and_for_what_was_made() -> None:
    scores = torch.tensor([[4.0, 3.0, 2.9, 2.8], [4.0, 3.0, 2.9, 2.8]])
    contexts = [torch.tensor([0]), torch.tensor([1, 2, 2])]
    sampler = Sampler(Sampling(repetition_penalty=1.5), contexts, 3, CPU)
    chosen = torch.cat([sampler.choose(scores) for _ in range(3)], 1)
    # The first row avoids 0, then also 1, then also 2; the second takes 0, then 3, then 0 again.
    assert chosen.tolist() == [[1, 2, 3], [0, 3, 0]]


# -- draws ------------------------------------------------------------------------------------


def test_draws_follow_the_softmax() -> None:
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).expand(20_000, 3)
    uniform = torch.rand(20_000, 1, dtype=torch.float64)
    shares = draw(scores, uniform).flatten().bincount(minlength=3) / len(scores)
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.015)
    cold = draw(scores / 0.5, uniform).flatten().bincount() / len(scores)
    assert cold[0].item() == pytest.approx(0.25 / 0.38, abs=0.015)


@given(st.integers(0, 2**53 - 1), st.integers(0, 9))
def test_what_was_taken_out_is_never_drawn(number: int, kept: int) -> None:
    scores = torch.full((1, 10), -torch.inf)
    scores[0, kept] = -3.0
    scores[0, (kept + 3) % 10] = 2.0
    uniform = torch.tensor([[number * 2.0**-53]], dtype=torch.float64)
    assert draw(scores, uniform).item() in (kept, (kept + 3) % 10)


def drawn(contexts: int, seed: int, rows: Tensor) -> Tensor:
    sampler = Sampler(Sampling(1.0, seed=seed), [torch.tensor([0])] * contexts, 20, CPU)
    return torch.cat([sampler.choose(rows) for _ in range(20)], 1)


def test_a_row_draws_by_its_own_seed_whatever_the_others_do() -> None:
    rows, state = logits(3), torch.get_rng_state()
    together = drawn(3, 5, rows)
    for row in range(3):
        assert torch.equal(drawn(1, 5 + row, rows[row : row + 1]), together[row : row + 1])
    assert torch.equal(torch.get_rng_state(), state)
    same = drawn(2, 5, rows[:1].expand(2, -1))
    assert not torch.equal(same[0], same[1])


class _Watch(TorchDispatchMode):
    """The operators that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.calls += 1
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def test_a_choice_does_not_wait_for_the_device() -> None:
    sampling = Sampling(0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
    contexts = [torch.randint(0, 300, (5,)) for _ in range(2)]
    sampler = Sampler(sampling, contexts, 3, CPU)
    with _Watch() as watch:
        for _ in range(3):
            sampler.choose(logits(2))
    assert watch.calls > 50
    assert watch.waits == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_k": 0}, "top_k 0 keeps no token"),
        ({"top_p": 0.0}, "top_p 0.0 is no share"),
        ({"top_p": 1.1}, "top_p 1.1 is no share"),
        ({"min_p": -0.1}, "min_p -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0 is not above 0"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**options)
