"""Perplexity by its definition, in both modes, on both kinds of model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from frontend.models import VOCABULARY, build, logits, tokens
from tiny import compile_tiny

import ssmc
from ssmc.core import States
from ssmc.corpus import read_texts, token_windows
from ssmc.demo import evaluation_file
from ssmc.errors import NumericsError
from ssmc.evaluate import perplexity

MODES = ["prefill", "recurrent"]


def uniform(ids: torch.Tensor, states: States | None = None) -> tuple[torch.Tensor, States]:
    return torch.zeros(*ids.shape, VOCABULARY), {}


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_knows_nothing_has_the_size_of_the_vocabulary(mode: str) -> None:
    found = perplexity(uniform, tokens(5, 7), mode, batch=2)  # type: ignore[arg-type]
    assert found.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert (found.tokens, found.windows) == (5 * 6, 5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ["mamba", "mamba2"])
def test_agrees_with_the_definition(mode: str, architecture: str) -> None:
    model, windows = build(architecture), tokens(5, 23)
    losses = []
    for window in windows:  # one window at a time, in float64, token by token
        scores = logits(model, window[None]).double().log_softmax(-1)[0]
        losses += [-scores[t, window[t + 1]].item() for t in range(len(window) - 1)]
    expected = math.exp(math.fsum(losses) / len(losses))
    found = perplexity(ssmc.trace(model), windows, mode, batch=3)  # type: ignore[arg-type]
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert (found.tokens, found.windows) == (5 * 22, 5)


@pytest.mark.parametrize("architecture", ["mamba", "mamba2"])
@pytest.mark.parametrize("execution", ["lowered", "simulated"])
def test_both_modes_agree_on_a_compiled_model(architecture: str, execution: str) -> None:
    compiled, windows = compile_tiny(architecture), tokens(6, 31)
    compiled.execution = execution  # type: ignore[assignment]
    parallel, stepwise = (perplexity(compiled, windows, m).perplexity for m in MODES)  # type: ignore[arg-type]
    assert stepwise == pytest.approx(parallel, rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_by_what_went_before(mode: str) -> None:
    model, windows = ssmc.trace(build("mamba")), tokens(3, 200)
    found = perplexity(model, windows, mode)  # type: ignore[arg-type]
    assert [(p.first, p.last) for p in found.by_length] == [(1, 64), (65, 128), (129, 199)]
    losses = [math.log(p.perplexity) * (p.last - p.first + 1) for p in found.by_length]
    assert math.exp(sum(losses) / 199) == pytest.approx(found.perplexity)
    alone = perplexity(model, windows[:, :65], mode)  # type: ignore[arg-type]
    assert found.by_length[0].perplexity == pytest.approx(alone.perplexity, rel=1e-5)


def test_batches_and_progress() -> None:
    model, windows = ssmc.trace(build("mamba")), tokens(5, 9)
    seen: list[tuple[int, int]] = []
    found = perplexity(model, windows, batch=2, progress=lambda *at: seen.append(at))
    assert seen == [(0, 5), (2, 5), (4, 5), (5, 5)]
    assert perplexity(model, windows, batch=5).perplexity == pytest.approx(found.perplexity)


def test_the_mean_is_over_windows() -> None:
    def sure(ids: torch.Tensor, states: States | None = None) -> tuple[torch.Tensor, States]:
        known = (ids[:, :1] == 1).float()[..., None]
        scores = torch.zeros(*ids.shape, 4)
        scores[..., 1:2] = 3 * known
        return scores, {}

    windows = torch.tensor([[1, 1, 1], [2, 2, 2]])
    first, second = math.log(3 + math.exp(3)) - 3, math.log(4)
    assert perplexity(sure, windows).perplexity == pytest.approx(math.exp((first + second) / 2))


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_is_no_number_is_an_error(mode: str) -> None:
    def lost(ids: torch.Tensor, states: States | None = None) -> tuple[torch.Tensor, States]:
        return torch.full((*ids.shape, 4), torch.nan), {}

    with pytest.raises(NumericsError, match="NaN or infinite") as caught:
        perplexity(lost, torch.ones(2, 3, dtype=torch.int64), mode)  # type: ignore[arg-type]
    assert "inspect --numerics" in (caught.value.hint or "")


def test_quantising_the_demo_costs_little(demo_folder: Path) -> None:
    compiled, model = ssmc.load(demo_folder), ssmc.load_model("demo")
    assert model.tokenizer is not None
    assert model.eos_token_id is not None
    texts = read_texts(evaluation_file())
    windows = token_windows(model.tokenizer, texts, model.eos_token_id, 128)[:8]
    before = perplexity(ssmc.trace(model.module), windows).perplexity
    after = perplexity(compiled, windows).perplexity
    assert after / before == pytest.approx(1, abs=0.01)
