"""Text of tokens as they come: what is given out in pieces is what decoding the whole gives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tokenizer as words
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ssmc import demo
from ssmc.errors import UsageError
from ssmc.runtime.text import Continuation, Ending, TextStream, text_behind

DEMO = Tokenizer.from_file(str(demo.model_folder() / "tokenizer.json"))
SAMPLE = "Größe, naïve 日本語 text 👩🏽‍🚀 and\r\n\ttabs — \u2028 end…"


def letters() -> Tokenizer:
    """One token a character, so that any string of stops lies across tokens; `<end>` is special."""
    alphabet = {c: i for i, c in enumerate("abcdefgh \n")}
    made = Tokenizer(models.WordLevel(alphabet, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken("<end>", special=True)])
    return made


def sentence_pieces() -> Tokenizer:
    """Words with a mark in place of the space in front, which decoding drops from the first."""
    made = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2, "▁": 3}, unk_token="c"))
    made.decoder = decoders.Metaspace()
    return made


def pieces(tokenizer: Tokenizer, ids: list[int], before: list[int]) -> list[str]:
    stream = TextStream(tokenizer, before)
    found = [*(stream.add(i) for i in ids), stream.end()]
    assert "".join(found) == stream.text
    return found


@given(st.lists(st.integers(2, 3999), max_size=80), st.integers(0, 80))
@settings(max_examples=200, deadline=None)
def test_any_tokens_in_pieces_are_the_whole(ids: list[int], cut: int) -> None:
    # Cut after whole characters: a prompt never ends within one.
    before, new = ids[:cut], ids[cut:]
    if "\ufffd" not in DEMO.decode(before[-1:]):
        assert "".join(pieces(DEMO, new, before)) == text_behind(DEMO, before, new)


@given(st.text(max_size=60))
@settings(deadline=None)
def test_any_text_comes_back(text: str) -> None:
    before = DEMO.encode("The beginning: ").ids
    found = pieces(DEMO, DEMO.encode(text, add_special_tokens=False).ids, before)
    assert "".join(found) == text.replace("<|endoftext|>", "").replace("<|pad|>", "")


def test_characters_are_given_out_whole_and_at_once() -> None:
    ids = DEMO.encode(SAMPLE).ids
    assert any("\ufffd" in DEMO.decode([i]) for i in ids), "no character in several tokens"
    found = pieces(DEMO, ids, [])
    assert "".join(found) == SAMPLE
    assert not any("\ufffd" in piece for piece in found)
    assert pieces(DEMO, DEMO.encode("one two three").ids, [])[-1] == ""


def test_a_character_that_is_never_finished() -> None:
    half = DEMO.encode("日").ids[:1]
    assert pieces(DEMO, half, []) == ["", "\ufffd"]
    many = pieces(DEMO, half * 50, [])
    assert "".join(many) == DEMO.decode(half * 50)
    assert "".join(many[:-1]), "bytes that are no text hold up the rest"


def test_the_space_behind_the_prompt() -> None:
    for tokenizer, before, text in ((words(), [3], " w5 w7"), (sentence_pieces(), [0], " b a")):
        ids = [5, 7] if before == [3] else [1, 0]
        assert "".join(pieces(tokenizer, ids, before)) == text
        assert "".join(pieces(tokenizer, ids, [])) == text[1:]


# -- stop strings -----------------------------------------------------------------------------

TEXT = st.text("abc", max_size=30)


@given(TEXT, st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
@settings(deadline=None)
def test_stops_across_tokens(text: str, stop: list[str]) -> None:
    tokenizer = letters()
    row = Continuation(Ending(stop=tuple(stop), tokenizer=tokenizer))
    given_out = ""
    for token in tokenizer.encode(text).ids:
        given_out += row.add(token)
        assert not any(s in given_out for s in stop)
    given_out += row.finish()
    ends = [text.index(s) + len(s) for s in stop if s in text]
    if ends:
        first = min(ends)  # the string that is complete first; of those, the one that begins first
        shown = min(text.index(s) for s in stop if s in text[:first])
        assert (given_out, row.ended, len(row.tokens)) == (text[:shown], "stop", first)
    else:
        assert (given_out, row.ended, len(row.tokens)) == (text, "length", len(text))
    assert row.text == given_out


def test_only_what_may_begin_a_stop_is_held_back() -> None:
    tokenizer = letters()
    stream = TextStream(tokenizer, stop=("abc", "\nb"))
    found = [stream.add(i) for i in tokenizer.encode("aabaab\na").ids]
    assert found == ["", "a", "", "ab", "a", "", "ab", "\n"]
    assert stream.end() == "a"


def test_a_stop_within_a_token() -> None:
    ids = DEMO.encode("The President of").ids
    row = Continuation(Ending(stop=("esid",), tokenizer=DEMO))
    assert "".join(row.add(i) for i in ids) + row.finish() == "The Pr"
    assert row.tokens == ids[: len(row.tokens)]
    assert "esid" in DEMO.decode(row.tokens)
    assert "esid" not in DEMO.decode(row.tokens[:-1])


def test_special_tokens_end_a_text_and_are_not_in_it() -> None:
    tokenizer = letters()
    special = tokenizer.token_to_id("<end>")
    ending = Ending(stop=("<end>", "ff"), tokenizer=tokenizer)
    assert ending.eos == {special}
    row = Continuation(ending)
    assert [row.add(i) for i in (0, 1, special, 2)] == ["a", "b", "", ""]
    assert (row.tokens, row.ended, row.text) == ([0, 1, special], "eos", "ab")
    assert "".join(pieces(tokenizer, [0, special, 1], [])) == "ab"


def test_without_a_tokenizer_there_is_no_text() -> None:
    row = Continuation(Ending(frozenset({9})))
    assert [row.add(i) for i in (3, 9, 4)] == ["", "", ""]
    assert (row.tokens, row.ended, row.text, row.finish()) == ([3, 9], "eos", "", "")


def test_refuses() -> None:
    with pytest.raises(UsageError, match="stop strings need the tokenizer"):
        Ending(stop=("a",))
    with pytest.raises(UsageError, match="a stop string is empty"):
        Ending(stop=("a", ""), tokenizer=letters())
