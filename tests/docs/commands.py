"""The commands of a page: indented by four columns, as the pages have them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("ssmc", "make", "pip", "python", "lm_eval")
_LINE = re.compile(rf"^ {{4}}((?:{'|'.join(PROGRAMS)})\b(?:.*\\\n)*.*)$", re.MULTILINE)
PLACES = {"MODEL": "demo", "OUT": "out", "OUT-native": "out-native"}
"""What stands for what a user has."""


@dataclass(frozen=True)
class Command:
    """A command as words, without what the shell does with its output; and where it stands."""

    words: tuple[str, ...]
    page: Path
    line: int

    @property
    def program(self) -> str:
        """What is called."""
        return self.words[0]

    def __str__(self) -> str:
        return shlex.join(self.words)


def commands(page: Path) -> Iterator[Command]:
    """Every command of a page, in order."""
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", lambda f: "\n" * f[0].count("\n"), text, flags=re.M | re.S)
    for found in _LINE.finditer(prose):
        line = text.count("\n", 0, found.start()) + 1
        lexer = shlex.shlex(found[1].replace("\\\n", " "), posix=True, punctuation_chars=";&>")
        lexer.whitespace_split = True
        for words in _split(list(lexer)):
            yield Command(tuple(PLACES.get(word, word) for word in words), page, line)


def _split(words: list[str]) -> Iterator[list[str]]:
    """The commands of a line; where output goes is dropped."""
    current: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in (";", "&&"):
            yield current
            current = []
        elif word == ">":
            next(rest)
        else:
            current.append(word)
    yield current
