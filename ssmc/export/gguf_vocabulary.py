"""A tokenizer in GGUF's metadata: tokens, merges, and what marks the ends of a text.

llama.cpp has BPE tokenizers of bytes. How such a tokenizer splits a text before it merges is a name
in the file, behind which llama.cpp has a program of its own; the names here are those whose program
does what the tokenizer says it does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from ssmc.export.gguf_fields import Fields
from ssmc.runtime import Artefact

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType
BYTES_ALONE = "gpt-2"
"""The name of the split that `ByteLevel` does by itself."""
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {_SPLIT % "{1,3}": "llama-bpe", _SPLIT % "": "qwen2"}
"""Names of splits by the regular expression in front of `ByteLevel`."""


@dataclass(frozen=True)
class Vocabulary:
    """Metadata, and what llama.cpp does otherwise than the tokenizer."""

    fields: Fields
    notes: list[str] = field(default_factory=list)


def vocabulary(artefact: Artefact, size: int) -> Vocabulary:
    """The vocabulary of an artefact whose model has `size` tokens.

    One that llama.cpp cannot have is left out: it then runs on token ids alone.
    """
    from tokenizers import Tokenizer

    if artefact.tokenizer is None:
        return _without("the artefact has no tokenizer")
    tokenizer = Tokenizer.from_str(artefact.tokenizer)
    data = json.loads(tokenizer.to_str())
    split = _split(data)
    if split is None:
        return _without("llama.cpp splits texts otherwise than the tokenizer")
    if max(tokenizer.get_vocab().values()) >= size:
        return _without(f"the tokenizer has more tokens than the model, {size}")
    notes = []
    if data["normalizer"] is not None:
        notes.append("llama.cpp does not normalise texts (NFC) as the tokenizer does")
    tokens, kinds = _tokens(tokenizer, data, size)
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [_merge(pair) for pair in data["model"]["merges"]],
    }
    return Vocabulary(fields | _ends(tokenizer, artefact.about) | _chat(artefact.about), notes)


def _without(reason: str) -> Vocabulary:
    return Vocabulary(
        {"tokenizer.ggml.model": "none"}, [f"no vocabulary, token ids alone: {reason}"]
    )


def _split(data: dict[str, Any]) -> str | None:
    """llama.cpp's name for what a tokenizer does to a text before it merges; None: it has none."""
    model, normalizer = data["model"], data["normalizer"] or {"type": "NFC"}
    if model["type"] != "BPE" or model["byte_fallback"] or normalizer["type"] != "NFC":
        return None
    first = data["pre_tokenizer"] or {"type": None}
    match first.get("pretokenizers", [first]):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            name = BYTES_ALONE
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if pattern in SPLITS:
            name = SPLITS[pattern]
        case _:
            return None
    whole_words_first = name == "llama-bpe"
    return name if model["ignore_merges"] == whole_words_first else None


def _tokens(tokenizer: Any, data: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Each of `size` tokens as text, and its kind."""
    text = {token: word for word, token in tokenizer.get_vocab().items()}
    special = {added["id"]: added["special"] for added in data["added_tokens"]}
    kinds = [
        UNUSED if i not in text else NORMAL if i not in special
        else CONTROL if special[i] else USER_DEFINED
        for i in range(size)
    ]  # fmt: skip
    return [text.get(i, f"[PAD{i}]") for i in range(size)], kinds


def _merge(pair: str | list[str]) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)


def _ends(tokenizer: Any, about: dict[str, Any]) -> Fields:
    """The tokens at the ends of a text, and whether the tokenizer puts them there."""
    config, eos = about["config"], about.get("eos")
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    ids = tokenizer.encode("a").ids
    start = ids[: ids.index(plain[0])]
    behind = ids[len(start) + len(plain) :]
    ends = eos if isinstance(eos, list) else [eos]
    found = {
        "bos_token_id": start[0] if start else config.get("bos_token_id"),
        "eos_token_id": ends[0],
        "eot_token_id": ends[1] if len(ends) > 1 else None,
        "padding_token_id": config.get("pad_token_id"),
        "add_bos_token": bool(start),
        "add_eos_token": bool(behind),
    }
    return {f"tokenizer.ggml.{name}": value for name, value in found.items() if value is not None}


def _chat(about: dict[str, Any]) -> Fields:
    template = (about.get("chat") or {}).get("template")
    return {} if template is None else {"tokenizer.chat_template": template}
