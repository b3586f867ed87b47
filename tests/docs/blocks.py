"""The fenced blocks of a Markdown file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the file and the line its text begins at."""

    language: str
    text: str
    path: Path
    line: int


def blocks(path: Path) -> Iterator[Block]:
    """Every fenced block of a file, in order."""
    page = path.read_text(encoding="utf-8")
    for found in _FENCE.finditer(page):
        line = page.count("\n", 0, found.start()) + 2
        yield Block(found[1], found[2], path, line)


def naming(path: Path, word: str) -> Block:
    """The first block of Python in a file that has a word in it."""
    return next(b for b in blocks(path) if b.language == "python" and word in b.text)
