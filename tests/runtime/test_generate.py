"""Generation: greedy is the argmax, draws are seeded, texts end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from frontend.models import tokens
from tiny import compile_tiny

import ssmc
from ssmc.core import States
from ssmc.errors import UsageError
from ssmc.runtime import CompiledModel
from ssmc.runtime.generate import Sampling, generate, stream


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    return compile_tiny("mamba")


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_is_the_argmax_of_the_whole_sequence(compiled: CompiledModel, batch: int) -> None:
    ids = tokens(batch, 5)
    expected = ids
    for _ in range(9):
        logits, _ = compiled(expected)
        expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(compiled.generate(ids, 9), expected)


def counting(ids: torch.Tensor, states: States | None = None) -> tuple[torch.Tensor, States]:
    """A model whose next token is the last one plus one."""
    logits = torch.nn.functional.one_hot((ids + 1) % 50, 50).float()
    return logits, {"seen": torch.tensor(ids.shape[1])}


def test_ends_when_every_row_has_ended() -> None:
    ids = torch.tensor([[3], [6]])
    made = generate(counting, ids, 40, eos=9)
    assert made.tolist() == [[3, 4, 5, 6, 7, 8, 9], [6, 7, 8, 9, 9, 9, 9]]
    assert generate(counting, ids, 4, eos=9).shape == (2, 5)
    assert generate(counting, ids, 4).tolist() == [[3, 4, 5, 6, 7], [6, 7, 8, 9, 10]]


def test_an_artefact_ends_at_its_own_eos(tiny_artefact: Path) -> None:
    loaded = ssmc.load(tiny_artefact)
    ids = tokens(1, 4)
    made = loaded.generate(ids, 12)[0, 4:].tolist()
    loaded.artefact.about["eos"] = made[2]
    assert loaded.generate(ids, 12)[0, 4:].tolist() == made[: made.index(made[2]) + 1]


def test_the_prompt_runs_once_and_then_single_tokens() -> None:
    lengths = []

    def watched(ids: torch.Tensor, states: States | None = None) -> tuple[torch.Tensor, States]:
        lengths.append((ids.shape[1], None if states is None else int(states["seen"])))
        return counting(ids)

    list(stream(watched, torch.tensor([[1, 2, 3]]), 4))
    assert lengths == [(3, None), (1, 3), (1, 1), (1, 1)]


def test_draws_follow_the_seed(compiled: CompiledModel) -> None:
    ids = tokens(2, 4)

    def draw(seed: int) -> torch.Tensor:
        return compiled.generate(ids, 20, Sampling(temperature=2.0, seed=seed))

    state = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(draw(1), draw(2))


def test_draws_follow_the_softmax() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).expand(20_000, 3)
    generator = torch.Generator().manual_seed(0)
    drawn = Sampling(temperature=1.0).choose(logits, generator)
    shares = drawn.flatten().bincount(minlength=3) / len(logits)
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.015)
    cold = Sampling(temperature=0.5).choose(logits, generator).flatten().bincount() / len(logits)
    assert cold[0].item() == pytest.approx(0.25 / 0.38, abs=0.015)


def test_top_k_keeps_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).expand(500, 4)
    drawn = Sampling(temperature=5.0, top_k=2).choose(logits, torch.Generator().manual_seed(0))
    assert set(drawn.flatten().tolist()) == {1, 3}
    all_of_them = Sampling(temperature=5.0, top_k=9).choose(logits, torch.Generator())
    assert set(all_of_them.flatten().tolist()) == {0, 1, 2, 3}


def test_top_k_of_one_is_greedy(compiled: CompiledModel) -> None:
    ids = tokens(2, 4)
    drawn = compiled.generate(ids, 8, Sampling(temperature=3.0, top_k=1))
    assert torch.equal(drawn, compiled.generate(ids, 8))


def test_errors(compiled: CompiledModel) -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        compiled.generate(torch.zeros(1, 0, dtype=torch.int64))
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="temperature"):
            Sampling(temperature=temperature)
    with pytest.raises(UsageError, match="top_k 0 keeps no token"):
        Sampling(top_k=0)


def test_the_demo_says_what_the_float_model_says(demo_folder: Path) -> None:
    compiled = ssmc.load(demo_folder)
    prompt = "The state of the union is"
    assert compiled.tokenizer is not None
    ids = torch.tensor([compiled.tokenizer.encode(prompt).ids])
    ids = compiled.generate(ids, 96)
    model = ssmc.trace(ssmc.load_model("demo").module)
    expected, _ = model(ids)
    simulated, _ = compiled(ids)
    agreement = (expected.argmax(-1) == simulated.argmax(-1)).double().mean().item()
    assert agreement >= 0.9
