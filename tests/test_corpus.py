"""Text files, windows of tokens, and what is said about files that are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import tokenizer

from ssmc.corpus import file_hash, read_prompts, read_texts, sample_windows, token_windows
from ssmc.errors import UsageError


def write(folder: Path, text: str | bytes, name: str = "text.jsonl") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_reads_text_and_page_fields(tmp_path: Path) -> None:
    lines = '{"text": "one", "page": "no"}\n\n  \n{"page": "two", "id": 3}\r\n{"text": ""}'
    assert read_texts(write(tmp_path, lines)) == ["one", "two", ""]


def test_a_plain_file_is_one_document_as_it_is(tmp_path: Path) -> None:
    text = " a\n\n{b\fc\n"
    assert read_texts(write(tmp_path, text, "text.txt")) == [text]


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\u2029"])
def test_a_line_of_json_may_hold_any_separator(tmp_path: Path, separator: str) -> None:
    texts = [f"a{separator}b", "c"]
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    assert read_texts(write(tmp_path, lines)) == texts


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert read_texts(write(tmp_path, b'\xef\xbb\xbf{"text": "a"}')) == ["a"]


GOOD = '{"text": "good"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "text.jsonl holds no text"),
        ("\n \n", "text.jsonl holds no text"),
        ('{"text": " "}\n', "text.jsonl holds no text"),
        (GOOD + '{"text": "cut', "text.jsonl:2: broken JSON: Unterminated string starting at"),
        (GOOD + "\n" + GOOD + "{]", "text.jsonl:4: broken JSON"),
        (GOOD + '{"body": "x"}', "text.jsonl:2: no field 'text' with a string in it"),
        (GOOD + '{"text": 3}', "text.jsonl:2: no field 'text'"),
        (GOOD + '["text"]', "text.jsonl:2: no field 'text'"),
        (GOOD + '"text"', "text.jsonl:2: no field 'text'"),
        (GOOD + '{"text": "\\ud800"}', "text.jsonl:2: half of a surrogate pair"),
        (b'{"text": "\xff"}', "cannot read .*text.jsonl: not UTF-8 text"),
    ],
)
def test_a_broken_file_is_named_with_its_line(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read_texts(write(tmp_path, text))
    assert caught.value.hint


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*nowhere.jsonl: No such file"):
        read_texts(tmp_path / "nowhere.jsonl")
    with pytest.raises(UsageError, match="Is a directory"):
        read_texts(tmp_path)


def test_prompts(tmp_path: Path) -> None:
    lines = '{"prompt": "one", "id": 3}\n\n{"prompt": " two\\n", "text": "no"}\r\n'
    expected = [{"prompt": "one", "id": 3}, {"prompt": " two\n", "text": "no"}]
    assert read_prompts(write(tmp_path, lines)) == expected
    plain = "one\r\n  \n two \n{\u2028}"
    rows = read_prompts(write(tmp_path, plain, "prompts.txt"))
    assert rows == [{"prompt": p} for p in ("one", " two ", "{\u2028}")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n \n", "text.jsonl holds no prompt"),
        ('{"prompt": "a"}\n{"text": "b"}', "text.jsonl:2: no field 'prompt' with a string in it"),
        ('{"prompt": ["a"]}', "text.jsonl:1: no field 'prompt'"),
        ('{"prompt": "\\udc00"}', "text.jsonl:1: half of a surrogate pair"),
        ('{"prompt": "a', "text.jsonl:1: broken JSON"),
    ],
)
def test_prompts_that_are_broken(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_prompts(write(tmp_path, text))


def test_windows_hold_a_separator_before_each_document() -> None:
    windows = token_windows(tokenizer(), ["w1 w2 w3", "w4", "w5 w6 w7 w8"], 0, 3)
    # 0 1 2 | 3 0 4 | 0 5 6 | 7 8: what is left over is dropped
    assert windows.tolist() == [[0, 1, 2], [3, 0, 4], [0, 5, 6]]
    assert windows.dtype == torch.int64


def test_windows_do_not_overlap_and_follow_the_text() -> None:
    texts = [f"w{i} w{i + 1}" for i in range(1, 30)]
    whole = token_windows(tokenizer(), texts, 0, 87)
    assert torch.equal(token_windows(tokenizer(), texts, 0, 10).flatten(), whole[0, :80])


def test_a_window_exactly_as_long_as_the_text() -> None:
    assert token_windows(tokenizer(), ["w1 w2 w3"], 0, 4).shape == (1, 4)
    with pytest.raises(UsageError, match=r"my\.txt has 4 tokens, fewer than one window of 5"):
        token_windows(tokenizer(), ["w1 w2 w3"], 0, 5, "my.txt")


@pytest.mark.parametrize("length", [1, 0, -3])
def test_a_window_has_two_tokens_at_least(length: int) -> None:
    with pytest.raises(UsageError, match=f"window of {length} tokens is too short"):
        token_windows(tokenizer(), ["w1 w2 w3"], 0, length)


def test_samples_are_drawn_by_the_seed_without_replacement() -> None:
    windows = torch.arange(40).view(20, 2)
    drawn = sample_windows(windows, 8, 1)
    assert len({tuple(row) for row in drawn.tolist()}) == 8
    assert torch.equal(drawn, sample_windows(windows, 8, 1))
    assert not torch.equal(drawn, sample_windows(windows, 8, 2))
    assert sorted(sample_windows(windows, 99, 0).tolist()) == windows.tolist()
    with pytest.raises(UsageError, match="cannot calibrate on 0 samples"):
        sample_windows(windows, 0, 0)


def test_the_hash_is_of_the_bytes(tmp_path: Path) -> None:
    path = write(tmp_path, "abc")
    assert file_hash(path).startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")
