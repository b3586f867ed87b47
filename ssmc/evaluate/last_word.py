"""How often a model says the last word of a passage, given what comes before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ssmc.core.ranks import Ranks
from ssmc.core.saved import Saved
from ssmc.errors import UsageError
from ssmc.runtime.generate import Model

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class LastWord:
    """The share of passages whose last word was the likeliest, token by token; how many."""

    accuracy: float
    passages: int


def last_word(
    model: Model,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    separator: int,
    batch: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks | None = None,
) -> LastWord:
    """Whether greedy decoding would go on with the last word of each text, over all texts.

    The task of LAMBADA (Paperno et al. 2016, arXiv 1606.06031): every token of the word, with the
    space before it, has to be the likeliest. The token `separator` stands before each text.
    Passages of about one length run together, filled up behind, where nothing is scored; `ranks`
    are processes that share them. UsageError for a text without two words.
    """
    examples = sorted((split_last_word(tokenizer, text, separator) for text in texts), key=_length)
    ranks = ranks or Ranks()
    mine = ranks.deal([examples[i : i + batch] for i in range(0, len(examples), batch)])
    total, done, right = sum(map(len, mine)), 0, 0
    for some in mine:
        progress(done, total)
        right += _count_right(model, some, separator)
        done += len(some)
    progress(total, total)
    every = sum(part.about["right"] for part in ranks.gather(Saved({"right": right})))
    return LastWord(every / len(examples), len(examples))


Example = tuple[list[int], list[int]]


def split_last_word(tokenizer: Tokenizer, text: str, separator: int) -> Example:
    """The tokens of a text up to its last word, `separator` first, and those of the word.

    The text is encoded whole; the word begins where the tokens of what is before it end.
    """
    text = text.strip()
    before, _, word = text.rpartition(" ")
    if not before.strip():
        raise UsageError(
            f"a passage of fewer than two words: '{word}'",
            hint="a last word is predicted from what comes before it",
        )
    whole, start = (tokenizer.encode(t, add_special_tokens=False).ids for t in (text, before))
    count = min(len(start), len(whole) - 1)
    return [separator, *whole[:count]], whole[count:]


def _length(example: Example) -> int:
    return sum(map(len, example))


def _count_right(model: Model, examples: Sequence[Example], separator: int) -> int:
    rows = [before + word for before, word in examples]
    length = max(map(len, rows))
    ids = torch.tensor([row + [separator] * (length - len(row)) for row in rows])
    logits, _ = model(ids[:, :-1].to(getattr(model, "device", ids.device)))
    said = logits.argmax(-1).cpu()
    return sum(
        said[i, len(before) - 1 : len(before) - 1 + len(word)].tolist() == word
        for i, (before, word) in enumerate(examples)
    )
