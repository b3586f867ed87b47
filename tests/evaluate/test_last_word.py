"""Last words: where they begin, which are right, and that filling up changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import EOS, TEXT, tokenizer

from ssmc.errors import UsageError
from ssmc.evaluate import last_word
from ssmc.evaluate.last_word import split_last_word

VOCABULARY = 97


class Knows:
    """A model that says token + 1, except behind the tokens in `wrong`."""

    def __init__(self, *wrong: int) -> None:
        self.wrong = torch.tensor(wrong, dtype=torch.long)
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, ids: torch.Tensor, states: Any = None) -> tuple[torch.Tensor, Any]:
        self.shapes.append(tuple(ids.shape))
        said = torch.where(torch.isin(ids, self.wrong), 0, ids + 1)
        return torch.nn.functional.one_hot(said, VOCABULARY + 1).float(), None


def test_the_word_is_what_follows_the_last_space() -> None:
    assert split_last_word(tokenizer(), "w3 w4  w5 \n", EOS) == ([EOS, 3, 4], [5])


def test_a_word_of_several_tokens_needs_them_all() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = Tokenizer(models.BPE({c: i for i, c in enumerate("_Ġabcdefg")}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert split_last_word(letters, "a bcd", 0) == ([0, 2], [1, 3, 4, 5])
    says = {2: 1, 1: 3, 3: 4, 4: 5}

    def model(ids: torch.Tensor, states: Any = None) -> tuple[torch.Tensor, Any]:
        said = torch.tensor([[says.get(int(i), 0) for i in row] for row in ids])
        return torch.nn.functional.one_hot(said, 9).float(), None

    assert last_word(model, letters, ["a bcd"], 0).accuracy == 1
    says[3] = 5
    assert last_word(model, letters, ["a bcd"], 0).accuracy == 0


def test_the_share_of_right_ones_whatever_the_batch() -> None:
    texts = ["w1 w2 w3", "w7 w8", "w9 w9 w9 w9 w10", "w4 w6", "w20 w21 w22 w23 w24 w25"]
    for batch in (1, 2, 8):
        found = last_word(Knows(7), tokenizer(), texts, EOS, batch)
        assert (found.accuracy, found.passages) == (3 / 5, 5)


def test_passages_of_one_length_run_together() -> None:
    model = Knows()
    last_word(model, tokenizer(), ["w1 w2 w3 w4 w5 w6", "w1 w2", "w1 w2 w3 w4 w5 w6"], EOS, 2)
    assert model.shapes == [(2, 6), (1, 6)]


def test_filling_up_changes_nothing_of_a_compiled_model(tiny_artefact: Any) -> None:
    import ssmc

    model, words = ssmc.load(tiny_artefact), TEXT.split()
    texts = [" ".join(words[i : i + 3 + 5 * (i % 3)]) for i in range(9)]
    alone = [last_word(model, tokenizer(), [text], EOS).accuracy for text in texts]
    assert last_word(model, tokenizer(), texts, EOS).accuracy == pytest.approx(sum(alone) / 9)


@pytest.mark.parametrize("text", ["w1", "  w1 ", ""])
def test_one_word_is_no_passage(text: str) -> None:
    with pytest.raises(UsageError, match="fewer than two words"):
        last_word(Knows(), tokenizer(), [text], EOS)
