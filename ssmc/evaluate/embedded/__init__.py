"""Tasks for lm-eval out of the embedded text, which need no network: the YAML files beside this.

They are cut by rules, the same every time, out of text that the embedded model has not seen. They
tell a model from its quantised form; they are not LAMBADA, HellaSwag or WikiText, whose forms they
have, and their scores do not compare with scores of those.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmc.corpus import read_texts
from ssmc.demo import evaluation_file

if TYPE_CHECKING:
    from datasets import DatasetDict

FOLDER = Path(__file__).parent
PASSAGE = 40  # words of a passage or a context, at least
WORD = 4  # letters of a word to be predicted, at least
ENDINGS = 4


def last_word(**_: Any) -> DatasetDict:
    """Passages, `text`, whose last word is in them before: as in LAMBADA (arXiv 1606.06031)."""
    return _test({"text": text} for text in passages(read_texts(evaluation_file())))


def cloze(**_: Any) -> DatasetDict:
    """`ctx`, `endings` and the `label` of the true one: as in HellaSwag (arXiv 1905.07830).

    The others are sentences of the same document, drawn with a fixed seed.
    """
    return _test(questions(read_texts(evaluation_file())))


def pages(**_: Any) -> DatasetDict:
    """Whole documents, `page`: as in WikiText (arXiv 1609.07843)."""
    return _test({"page": text} for text in read_texts(evaluation_file()))


def _test(rows: Iterator[dict[str, Any]]) -> DatasetDict:
    from datasets import Dataset, DatasetDict

    return DatasetDict({"test": Dataset.from_list(list(rows))})


def passages(texts: list[str]) -> Iterator[str]:
    """Whole sentences, as few as have PASSAGE words, up to a word that occurred before."""
    for text in texts:
        for sentences in _paragraphs(text):
            chosen: list[str] = []
            for sentence in sentences:
                chosen.append(sentence)
                while _words(chosen[1:]) >= PASSAGE:
                    del chosen[0]
                if _words(chosen) >= PASSAGE and (cut := _up_to_word(" ".join(chosen))):
                    yield cut
                    chosen = []


def _words(sentences: list[str]) -> int:
    return len(" ".join(sentences).split())


def _up_to_word(passage: str) -> str | None:
    """The passage up to its last word, where that one has WORD letters and was in it before."""
    cut = re.sub(r"[^\w]+$", "", passage)
    *before, word = re.findall(r"\w+", cut.lower())
    spoken = cut.split()[-1]
    return cut if spoken.isalpha() and len(word) >= WORD and word in before else None


def questions(texts: list[str]) -> Iterator[dict[str, Any]]:
    """Contexts of PASSAGE words or more, each with its next sentence among ENDINGS."""
    draw = random.Random(0)
    for text in texts:
        paragraphs = list(_paragraphs(text))
        every = list(dict.fromkeys(s for sentences in paragraphs for s in sentences))
        for sentences in paragraphs:
            context: list[str] = []
            for sentence in sentences:
                others = [s for s in every if s != sentence and s not in context]
                if _words(context) >= PASSAGE and len(others) >= ENDINGS - 1:
                    endings = [sentence, *draw.sample(others, ENDINGS - 1)]
                    draw.shuffle(endings)
                    label = endings.index(sentence)
                    yield {"ctx": " ".join(context), "endings": endings, "label": label}
                    context = []
                else:
                    context.append(sentence)


def _paragraphs(text: str) -> Iterator[list[str]]:
    """The sentences of each paragraph of running text: one that begins and ends as such does."""
    for paragraph in re.split(r"\n\s*\n", text):
        flat = " ".join(paragraph.split())
        if re.match(r"[A-Z\"']", flat) and re.search(r"[.!?][\"']?$", flat):
            yield re.split(r"(?<=[.!?]) (?=[A-Z\"'])", flat)
