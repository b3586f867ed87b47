"""The text side of `train_demo`: reading files, training the tokenizer, making tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ssmc.errors import UsageError

END, PAD = "<|endoftext|>", "<|pad|>"
SMALLEST_VOCABULARY = 256 + len((END, PAD))
DOCUMENTS_AT_ONCE = 4096


@dataclass(frozen=True)
class Source:
    """A text file that was read: its name, the hash of its bytes and its documents."""

    name: str
    sha256: str
    documents: tuple[str, ...]

    def summary(self) -> dict[str, str | int]:
        """What the training record keeps of it."""
        characters = sum(map(len, self.documents))
        return {
            "file": self.name,
            "sha256": self.sha256,
            "documents": len(self.documents),
            "characters": characters,
        }


@dataclass(frozen=True)
class Corpus:
    """The training text as tokens, its tokenizer, and held-out tokens where there are any."""

    sources: tuple[Source, ...]
    tokenizer: PreTrainedTokenizerFast
    tokens: Tensor
    held_out: Tensor | None


def read_corpus(
    paths: Sequence[Path], validation: Path | None, vocabulary: int, length: int
) -> Corpus:
    """Read the files, train a tokenizer on `paths` and encode everything.

    Raises:
        UsageError: see `read_source`; or less text than one sequence of `length` tokens.
    """
    sources = tuple(read_source(path) for path in paths)
    held_out = read_source(validation) if validation else None
    documents = [text for source in sources for text in source.documents]
    tokenizer = train_tokenizer(documents, vocabulary)
    tokens = encode(tokenizer, documents)
    _check_length(tokens, length, "the training text")
    if held_out is None:
        return Corpus(sources, tokenizer, tokens, None)
    held_out_tokens = encode(tokenizer, held_out.documents)
    _check_length(held_out_tokens, length, held_out.name)
    return Corpus(sources, tokenizer, tokens, held_out_tokens)


def _check_length(tokens: Tensor, length: int, name: str) -> None:
    if len(tokens) < length:
        raise UsageError(
            f"{name} has {len(tokens)} tokens, fewer than one sequence of {length}",
            hint="give more text or a smaller --length",
        )


def read_source(path: Path) -> Source:
    """The documents of a .txt file (one) or a .jsonl file (one a line, in `text`).

    Raises:
        UsageError: a file that is missing, not UTF-8, empty, of another kind, or has a broken line.
    """
    try:
        data = path.read_bytes()
        content = data.decode("utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start})") from error
    documents = tuple(text for text in _documents(path, content) if text.strip())
    if not documents:
        raise UsageError(f"{path} has no text in it")
    return Source(path.name, hashlib.sha256(data).hexdigest(), documents)


def _documents(path: Path, content: str) -> Iterator[str]:
    match path.suffix:
        case ".txt":
            yield content
        case ".jsonl":
            for number, line in enumerate(content.split("\n"), start=1):
                if line.strip():
                    yield _text_field(line, f"{path}:{number}")
        case _:
            raise UsageError(f"{path}: expected a .txt or a .jsonl file")


def _text_field(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: broken JSON ({error.msg}, column {error.colno})") from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UsageError(f"{where}: expected an object with a string in 'text'")
    return text


def train_tokenizer(documents: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocabulary` tokens; END is 0, PAD is 1, nothing is added."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer, length=len(documents))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, unk_token=END, pad_token=PAD
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> Tensor:
    """The documents as one row of int64 tokens, END before each."""
    backend, end = tokenizer.backend_tokenizer, tokenizer.bos_token_id
    parts = []
    for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
        encodings = backend.encode_batch_fast(list(documents[start : start + DOCUMENTS_AT_ONCE]))
        parts += [torch.tensor([end, *encoding.ids]) for encoding in encodings]
    return torch.cat(parts)
