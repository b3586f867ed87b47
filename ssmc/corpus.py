"""Text for calibration and evaluation: reading files, cutting windows of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ssmc.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FIELDS = ("text", "page")
FORM = "write one object with a field 'text' a line"


def read_texts(path: str | Path) -> list[str]:
    """The documents of a .jsonl file (one object a line, `text` or `page`) or of a plain text file.

    Raises UsageError where the file is missing, not UTF-8, or empty, and names the line that is
    broken.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(
            f"cannot read {path}: {reason}", hint="give a .jsonl or .txt file"
        ) from None
    texts = _documents(path, text) if path.suffix == ".jsonl" else [text]
    if not any(text.strip() for text in texts):
        raise UsageError(f"{path} holds no text", hint="give a .jsonl or .txt file with text in it")
    return texts


def _documents(path: Path, text: str) -> list[str]:
    lines = text.split("\n")  # splitlines would cut a JSON string at U+2028
    return [_document(path, i, line) for i, line in enumerate(lines, 1) if line.strip()]


def _document(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path}:{number}: broken JSON: {error.msg} at column {error.colno}", hint=FORM
        ) from None
    text = next((row[f] for f in FIELDS if f in row), None) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UsageError(f"{path}:{number}: no field 'text' with a string in it", hint=FORM)
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise UsageError(f"{path}:{number}: half of a surrogate pair, which is no text", hint=FORM)
    return text


def token_windows(
    tokenizer: Tokenizer, texts: Sequence[str], separator: int, length: int, name: str = "the text"
) -> torch.Tensor:
    """Windows of `length` tokens that do not overlap, [windows, length] int64.

    The documents are joined with the token `separator` before each; what is left over at the end
    is dropped. Raises UsageError where the text is shorter than one window.
    """
    if length < 2:
        raise UsageError(f"a window of {length} tokens is too short", hint="use 2 or more")
    ids = [i for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)
           for i in (separator, *e.ids)]  # fmt: skip
    if len(ids) < length:
        raise UsageError(
            f"{name} has {len(ids)} tokens, fewer than one window of {length}",
            hint="give more text or a shorter window",
        )
    count = len(ids) // length
    return torch.tensor(ids[: count * length]).view(count, length)


def sample_windows(windows: torch.Tensor, samples: int, seed: int) -> torch.Tensor:
    """`samples` of the windows, drawn without replacement by a generator seeded with `seed`."""
    if samples < 1:
        raise UsageError(f"cannot calibrate on {samples} samples", hint="use 1 or more")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:samples]]


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
