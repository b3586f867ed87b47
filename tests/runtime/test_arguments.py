"""`generate` takes what that of transformers takes, and says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from frontend.models import tokens
from tiny import compile_tiny
from torch import Tensor

import ssmc
from ssmc.core import Graph
from ssmc.errors import UsageError
from ssmc.frontend import Model
from ssmc.runtime import CompiledModel
from ssmc.runtime.arguments import generate

TEXTS = ("The President of the United", "It was", "In the year of our Lord one thousand and")
EOS, PAD = 0, 1


@pytest.fixture(scope="module")
def model() -> Model:
    """The embedded model as transformers runs it, without an end of its own."""
    loaded = ssmc.load_model("demo")
    loaded.module.generation_config.eos_token_id = None  # type: ignore[union-attr]
    return loaded


@pytest.fixture(scope="module")
def graph(model: Model) -> Graph:
    return ssmc.trace(model.module)


@pytest.fixture(scope="module")
def tokenizer(model: Model) -> Any:
    """The tokenizer as one of transformers."""
    from transformers import PreTrainedTokenizerFast

    special = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    return PreTrainedTokenizerFast(tokenizer_object=model.tokenizer, **special)


def padded(model: Model) -> dict[str, Tensor]:
    """The texts, of different lengths, padded on their left."""
    rows = [model.tokenizer.encode(text).ids for text in TEXTS]  # type: ignore[union-attr]
    longest = max(map(len, rows))
    ids = [[PAD] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def both(model: Model, graph: Graph, **arguments: Any) -> tuple[Tensor, Tensor]:
    """What is made here, and by transformers."""
    found = generate(graph, **arguments)
    expected = model.module.generate(**arguments)  # type: ignore[operator]
    return found, expected


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 24},
        {"max_length": 30},
        {"max_new_tokens": 5, "max_length": 30},
        {"max_new_tokens": 24, "repetition_penalty": 1.3},
        {"max_new_tokens": 24, "eos_token_id": [264, 15], "pad_token_id": PAD},
        {"max_new_tokens": 24, "do_sample": True, "top_k": 1},
        {"max_new_tokens": 24, "do_sample": True, "top_p": 1e-4, "temperature": 0.5},
        {"max_new_tokens": 24, "do_sample": True, "min_p": 1.0, "repetition_penalty": 1.2},
        {"max_new_tokens": 4, "use_cache": True, "num_beams": 1, "generation_config": None},
    ],
)
def test_the_tokens_are_those_of_transformers(
    model: Model, graph: Graph, arguments: dict[str, Any]
) -> None:
    found, expected = both(model, graph, **padded(model), **arguments)
    assert torch.equal(found, expected)
    assert len(found.unique()) > 10


@pytest.mark.parametrize("stop", ["the", " good idea", [" the land of", "States,", "good"]])
def test_stop_strings(model: Model, graph: Graph, tokenizer: Any, stop: Any) -> None:
    arguments = {"max_new_tokens": 24, "stop_strings": stop, "tokenizer": tokenizer}
    for text in TEXTS:  # one at a time: transformers lets ended rows go on where there is no eos
        ids = torch.tensor([model.tokenizer.encode(text).ids])  # type: ignore[union-attr]
        found, expected = both(model, graph, input_ids=ids, **arguments)
        assert torch.equal(found, expected)
    arguments |= {"eos_token_id": EOS, "pad_token_id": PAD}
    found, expected = both(model, graph, **padded(model), **arguments)
    assert torch.equal(found, expected)
    assert bool((found[:, -1] == PAD).any())


def test_streamers_hear_the_same(
    model: Model, graph: Graph, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import TextStreamer

    ids = torch.tensor([tokenizer.encode(TEXTS[0])])
    said = []
    for run in (model.module.generate, lambda **a: generate(graph, **a)):  # type: ignore[union-attr]
        capsys.readouterr()
        run(input_ids=ids, max_new_tokens=9, streamer=TextStreamer(tokenizer))  # type: ignore[operator]
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""


class Heard:
    """What a streamer is given."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        assert not self.ended
        self.values.append(value)

    def end(self) -> None:
        self.ended = True


def test_a_streamer_of_several_rows_hears_padding_behind_their_ends(
    model: Model, graph: Graph
) -> None:
    heard, arguments = Heard(), padded(model) | {"max_new_tokens": 24}
    made = generate(graph, **arguments, eos_token_id=264, pad_token_id=PAD, streamer=heard)
    assert heard.ended
    prompts, *rest = heard.values
    assert torch.equal(prompts, arguments["input_ids"])
    assert torch.equal(torch.stack(rest, 1), made[:, prompts.shape[1] :])
    assert bool((rest[-1] == PAD).any())


def test_draws_follow_the_seed() -> None:
    compiled, ids = compile_tiny("mamba"), tokens(2, 4)

    def draw(seed: int) -> Tensor:
        return compiled.generate(ids, 20, do_sample=True, temperature=2.0, seed=seed)

    state = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(draw(1), draw(2))
    by_default = [compiled.generate(ids, 40, do_sample=True, top_k=k) for k in (None, 50, 0)]
    assert torch.equal(by_default[0], by_default[1])
    assert not torch.equal(by_default[0], by_default[2])


def test_a_compiled_model_brings_its_tokenizer_along(tiny_artefact: Path) -> None:
    compiled = ssmc.load(tiny_artefact)
    ids = tokens(1, 4)
    made = compiled.generate(ids, 12)[0, 4:].tolist()
    third = compiled.tokenizer.decode(made[2:3])  # type: ignore[union-attr]
    stopped = compiled.generate(ids, 12, stop_strings=third)[0, 4:].tolist()
    assert stopped == made[: made.index(made[2]) + 1]


IDS = torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ({"num_beams": 4}, "num_beams=4 is not supported", "only num_beams=1 is"),
        ({"max_tokens": 4}, "max_tokens=4 is not supported", "max_new_tokens"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2 is not supported", None),
        ({"do_sample": True, "temperature": 0.0}, "temperature 0 draws nothing", "greedy"),
        ({"do_sample": True, "top_p": 2.0}, "top_p 2.0", None),
        ({"max_new_tokens": 0}, "0 new tokens behind a prompt of 3", None),
        ({"max_length": 3}, "0 new tokens behind a prompt of 3", None),
        ({"stop_strings": "a", "eos_token_id": 0}, "need the tokenizer", None),
        ({"attention_mask": torch.tensor([[1, 1, 0]] * 2)}, "attention_mask", "left"),
        ({"attention_mask": torch.ones(2, 4)}, "attention_mask", r"\[2, 3\]"),
        (
            {"attention_mask": torch.tensor([[0, 0, 0], [1, 1, 1]])},
            "nothing but padding",
            "end of each row",
        ),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str, hint: str | None) -> None:
    compiled = CompiledModel.__new__(CompiledModel)  # refused before anything runs
    with pytest.raises(UsageError, match=message) as caught:
        generate(compiled, IDS, **arguments)
    if hint:
        assert hint.replace("\\", "") in (caught.value.hint or "")


def test_refuses_rows_of_different_lengths_without_a_filler(tokenizer: Any) -> None:
    compiled = CompiledModel.__new__(CompiledModel)
    with pytest.raises(UsageError, match="have different lengths"):
        generate(compiled, IDS, stop_strings="a", tokenizer=tokenizer)
    with pytest.raises(UsageError, match=r"input_ids of shape \[3\]"):
        generate(compiled, IDS[0])


def test_what_has_no_effect_is_said() -> None:
    compiled = compile_tiny("mamba")
    with pytest.warns(UserWarning, match="temperature, top_k without do_sample=True") as caught:
        made = compiled.generate(IDS, 3, temperature=0.5, top_k=3)
    assert caught[0].filename == __file__
    assert torch.equal(made, compiled.generate(IDS, 3))
