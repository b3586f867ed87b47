"""The tasks over the embedded text: what is cut out of it."""

from __future__ import annotations

import pytest

from ssmc.corpus import read_texts
from ssmc.demo import evaluation_file
from ssmc.evaluate.embedded import ENDINGS, PASSAGE, WORD, passages, questions


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return read_texts(evaluation_file())


def test_the_last_word_of_a_passage_is_in_it_before(texts: list[str]) -> None:
    found = list(passages(texts))
    assert len(found) > 80
    for passage in found:
        before, _, word = passage.rpartition(" ")
        assert word.isalpha()
        assert len(word) >= WORD
        assert word.lower() in before.lower()
        assert len(passage.split()) >= PASSAGE - 1  # what \w+ calls two words may be one


def test_passages_are_in_the_text(texts: list[str]) -> None:
    flat = " ".join(" ".join(texts).split())
    assert all(passage in flat for passage in passages(texts))


def test_a_passage_goes_no_further_back_than_it_has_to() -> None:
    long = "One sentence of a few words stands here first. " * 20
    text = f"{long}It ends with a word that has been in it, namely words."
    assert next(len(p.split()) for p in passages([text])) < PASSAGE + 10


def test_the_true_ending_goes_on_from_its_context(texts: list[str]) -> None:
    flat = " ".join(" ".join(texts).split())
    found = list(questions(texts))
    assert len(found) > 200
    for question in found:
        endings = question["endings"]
        assert len(set(endings)) == ENDINGS
        assert f"{question['ctx']} {endings[question['label']]}" in flat


def test_questions_are_the_same_every_time_and_labels_are_spread(texts: list[str]) -> None:
    found = list(questions(texts))
    assert found == list(questions(texts))
    counts = [sum(q["label"] == i for q in found) for i in range(ENDINGS)]
    assert min(counts) > len(found) / ENDINGS / 1.5


def test_what_is_no_running_text_gives_nothing() -> None:
    table = "int a;\nint b;\n" * 40
    assert list(passages([table])) == []
    assert list(questions([table])) == []
