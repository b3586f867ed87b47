"""Tokenizers as the vocabularies of GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer

from ssmc.export import export
from ssmc.export.gguf_vocabulary import vocabulary
from ssmc.runtime import Artefact, read_artefact

from .test_gguf import fields


@pytest.fixture(scope="module")
def artefact(demo_folder: Path) -> Artefact:
    return read_artefact(demo_folder)


def test_the_vocabulary_is_the_tokenizers(demo_folder: Path, tmp_path: Path) -> None:
    done = export(demo_folder, tmp_path / "demo.gguf", "gguf")
    found = fields(done.out)
    data = json.loads((demo_folder / "tokenizer.json").read_text())
    words = {token: word for word, token in data["model"]["vocab"].items()}
    assert found["tokenizer.ggml.tokens"] == [words[i] for i in range(len(words))]
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in data["model"]["merges"]]
    kinds = found["tokenizer.ggml.token_type"]
    special = [i for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL]
    assert special == [added["id"] for added in data["added_tokens"]]
    assert set(kinds) == {gguf.TokenType.NORMAL, gguf.TokenType.CONTROL}
    ends = {"model": "gpt2", "pre": "gpt-2", "eos_token_id": 0, "padding_token_id": 1}
    ends |= {"add_bos_token": False, "add_eos_token": False}
    assert {name: found[f"tokenizer.ggml.{name}"] for name in ends} == ends


# As tokenizer.json of Llama 3 and of Qwen 2 spell them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def changed(tokenizer: Path, pre: dict[str, Any] | None, **model: Any) -> str:
    data = json.loads(tokenizer.read_text())
    data["model"] |= model
    data["pre_tokenizer"] = pre or data["pre_tokenizer"]
    return json.dumps(data)


def split(pattern: str, **bytes_: Any) -> dict[str, Any]:
    first = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    second = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {"type": "Sequence", "pretokenizers": [first, second | {"use_regex": False} | bytes_]}


@pytest.mark.parametrize(
    ("pre", "merges_last", "name"),
    [
        (None, False, "gpt-2"),
        (split(LLAMA3), True, "llama-bpe"),
        (split(QWEN2), False, "qwen2"),
        (split(LLAMA3), False, None),
        (split(r"\w+"), False, None),
        (split(QWEN2, add_prefix_space=True), False, None),
        ({"type": "Whitespace"}, False, None),
    ],
)
def test_how_texts_are_split_is_known_or_there_is_no_vocabulary(
    pre: dict[str, Any] | None,
    merges_last: bool,
    name: str | None,
    demo_folder: Path,
    artefact: Artefact,
) -> None:
    text = changed(demo_folder / "tokenizer.json", pre, ignore_merges=merges_last)
    found = vocabulary(Artefact(artefact.graph, artefact.about, {}, text), 8192)
    assert found.fields.get("tokenizer.ggml.pre") == name
    assert bool(found.notes) == (name is None)


def test_tokens_at_the_ends_of_texts(demo_folder: Path, artefact: Artefact) -> None:
    tokenizer = Tokenizer.from_file(str(demo_folder / "tokenizer.json"))
    data = json.loads(tokenizer.to_str())
    data["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "<|pad|>", "type_id": 0}})
    data["post_processor"]["special_tokens"] = {
        "<|pad|>": {"id": "<|pad|>", "ids": [1], "tokens": ["<|pad|>"]}
    }
    data["normalizer"] = {"type": "NFC"}
    about = artefact.about | {"eos": [0, 7], "chat": {"template": "{{ messages }}"}}
    found = vocabulary(Artefact(artefact.graph, about, {}, json.dumps(data)), 8200)
    ends = {"bos_token_id": 1, "eos_token_id": 0, "eot_token_id": 7, "add_bos_token": True}
    assert {name: found.fields[f"tokenizer.ggml.{name}"] for name in ends} == ends
    assert found.fields["tokenizer.ggml.tokens"][8192:] == [f"[PAD{i}]" for i in range(8192, 8200)]
    assert found.fields["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED
    assert found.fields["tokenizer.chat_template"] == "{{ messages }}"
    assert found.notes == ["llama.cpp does not normalise texts (NFC) as the tokenizer does"]
