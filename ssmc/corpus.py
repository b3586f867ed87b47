"""Text for calibration and evaluation: reading files, cutting windows of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmc.errors import UsageError

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

FIELDS = ("text", "page")


def read_texts(path: str | Path) -> list[str]:
    """The documents of a .jsonl file (one object a line, `text` or `page`) or of a plain text file.

    Raises UsageError where the file is missing, not UTF-8, or empty, and names the line that is
    broken.
    """
    path = Path(path)
    text = _read(path)
    texts = [text]
    if path.suffix == ".jsonl":
        texts = [str(row[found]) for row, found in _objects(path, text, FIELDS)]
    if not any(text.strip() for text in texts):
        raise UsageError(f"{path} holds no text", hint="give a .jsonl or .txt file with text in it")
    return texts


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """The prompts of a .jsonl file (one object with `prompt` a line), or of a file with one a line.

    Each is an object with a string `prompt` and whatever else its line has; blank lines count for
    nothing. Raises UsageError as `read_texts` does.
    """
    path = Path(path)
    text = _read(path)
    if path.suffix == ".jsonl":
        rows = [row for row, _ in _objects(path, text, ("prompt",))]
    else:
        lines = (line.removesuffix("\r") for line in text.split("\n"))
        rows = [{"prompt": line} for line in lines if line.strip()]
    if not rows:
        raise UsageError(f"{path} holds no prompt", hint="write one a line")
    return rows


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(
            f"cannot read {path}: {reason}", hint="give a .jsonl or .txt file"
        ) from None


def _objects(path: Path, text: str, fields: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """The object of each line that is not blank, with the first of `fields` that it has."""
    lines = text.split("\n")  # splitlines would cut a JSON string at U+2028
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _object(f"{path}:{number}", line, fields)


def _object(where: str, line: str, fields: Sequence[str]) -> tuple[dict[str, Any], str]:
    form = f"write one object with a field '{fields[0]}' a line"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{where}: broken JSON: {error.msg} at column {error.colno}", hint=form
        ) from None
    found = next((f for f in fields if f in row), None) if isinstance(row, dict) else None
    if found is None or not isinstance(row[found], str):
        raise UsageError(f"{where}: no field '{fields[0]}' with a string in it", hint=form)
    if not is_text(row[found]):
        raise UsageError(f"{where}: half of a surrogate pair, which is no text", hint=form)
    return row, found


def is_text(value: str) -> bool:
    """Whether a string is text: not where it has half of a surrogate pair."""
    return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)


def token_windows(
    tokenizer: Tokenizer, texts: Sequence[str], separator: int, length: int, name: str = "the text"
) -> torch.Tensor:
    """Windows of `length` tokens that do not overlap, [windows, length] int64.

    The documents are joined with the token `separator` before each; what is left over at the end
    is dropped. Raises UsageError where the text is shorter than one window.
    """
    import torch

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
    import torch

    if samples < 1:
        raise UsageError(f"cannot calibrate on {samples} samples", hint="use 1 or more")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:samples]]


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
