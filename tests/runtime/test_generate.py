"""Generation: greedy is the argmax, texts end, and prompts of a batch go on as each does alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from frontend.models import build, tokens
from tiny import compile_tiny
from torch import Tensor

import ssmc
from ssmc.core import States
from ssmc.errors import UsageError
from ssmc.runtime import CompiledModel
from ssmc.runtime.arguments import generate
from ssmc.runtime.generate import Model, follow, stream
from ssmc.runtime.sampling import Sampling
from ssmc.runtime.text import Continuation, Ending


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


def counting(ids: Tensor, states: States | None = None) -> tuple[Tensor, States]:
    """A model whose next token is the last one plus one."""
    logits = torch.nn.functional.one_hot((ids + 1) % 50, 50).float()
    return logits, {"seen": torch.full((len(ids),), ids.shape[1])}


def test_ends_when_every_row_has_ended() -> None:
    ids = torch.tensor([[3], [6]])
    made = generate(counting, ids, 40, eos_token_id=9)
    assert made.tolist() == [[3, 4, 5, 6, 7, 8, 9], [6, 7, 8, 9, 9, 9, 9]]
    assert generate(counting, ids, 4, eos_token_id=9).shape == (2, 5)
    assert generate(counting, ids, 4).tolist() == [[3, 4, 5, 6, 7], [6, 7, 8, 9, 10]]


def test_an_artefact_ends_at_its_own_eos(tiny_artefact: Path) -> None:
    loaded = ssmc.load(tiny_artefact)
    ids = tokens(1, 4)
    made = loaded.generate(ids, 12)[0, 4:].tolist()
    loaded.artefact.about["eos"] = made[2]
    assert loaded.generate(ids, 12)[0, 4:].tolist() == made[: made.index(made[2]) + 1]
    assert loaded.generate(ids, 12, eos_token_id=[])[0, 4:].tolist() == made


def test_the_prompt_runs_once_and_then_single_tokens() -> None:
    lengths = []

    def watched(ids: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        lengths.append((ids.shape[1], None if states is None else states["seen"].tolist()))
        return counting(ids)

    list(stream(watched, torch.tensor([[1, 2, 3]]), 4))
    assert lengths == [(3, None), (1, [3]), (1, [1]), (1, [1])]


def test_following_stops_at_a_word() -> None:
    row = Continuation(Ending())
    asked = iter([False, False, True])
    following = follow(stream(counting, torch.tensor([[1]]), 40), [row], lambda: next(asked))
    assert list(following) == [[""]] * 3
    assert (row.tokens, row.ended) == ([2, 3, 4], None)


# -- several prompts --------------------------------------------------------------------------

LENGTHS = (5, 1, 17, 5, 40)


def graph(architecture: str) -> Model:
    return ssmc.trace(build(architecture))


MODELS: dict[str, Callable[[], Model]] = {
    "traced mamba": lambda: graph("mamba"),
    "traced mamba2": lambda: graph("mamba2"),
    "compiled mamba": lambda: compile_tiny("mamba"),
    "compiled mamba2": lambda: compile_tiny("mamba2"),
    "states in 8 bits": lambda: compile_tiny(
        "mamba2", "hadamard,percentile,state{bits=8,rounding=stochastic}"
    ),
}


def made(model: Model, prompts: list[Tensor], sampling: Sampling) -> list[list[int]]:
    return torch.cat(list(stream(model, prompts, 12, sampling)), 1).tolist()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_in_a_batch_gives_what_it_gives_alone(name: str, temperature: float) -> None:
    model, prompts = MODELS[name](), [tokens(length) for length in LENGTHS]
    together = made(model, prompts, Sampling(temperature, repetition_penalty=1.1, seed=3))
    for row, ids in enumerate(prompts):
        alone = Sampling(temperature, repetition_penalty=1.1, seed=3 + row)
        assert made(model, [ids], alone) == [together[row]]
    assert len({tuple(row) for row in together}) == len(LENGTHS)


def test_errors(compiled: CompiledModel) -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        compiled.generate(torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(UsageError, match="the prompt is empty"):
        list(stream(compiled, [tokens(3), tokens(0)], 4))


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
