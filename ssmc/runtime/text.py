"""Tokens as they come, as text: whole characters, up to a string that stops it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer

from ssmc.errors import UsageError

CONTEXT = 8  # tokens in front that a decoder is shown: whether a space comes first depends on them
UNFINISHED = "\ufffd"  # what a character is decoded to whose bytes are not all there
LONGEST = 3  # of these a character can leave, one for each byte but the last


def text_behind(
    tokenizer: Tokenizer, before: Sequence[int], tokens: Sequence[int], *, special: bool = False
) -> str:
    """The text that `tokens` add to that of `before`; special tokens in it if `special`."""
    front = list(before[-CONTEXT:])
    both, start = (
        tokenizer.decode(ids, skip_special_tokens=not special) for ids in ([*front, *tokens], front)
    )
    return both[len(start) :]


class TextStream:
    """The text of tokens as they come, without special ones, up to the first of `stop`.

    `before` are the tokens in front of them. `text` is what has been given out; what may be the
    beginning of a stop string, or of a character, is held back until that is certain.
    """

    def __init__(
        self, tokenizer: Tokenizer, before: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._window = list(before[-CONTEXT:])
        self._read = len(self._certain())  # characters of the window's text that went on
        self._held = ""

    def add(self, token: int) -> str:
        """What can be given out now that `token` has come."""
        self._window.append(token)
        certain = self._certain()
        new, self._read = certain[self._read :], max(self._read, len(certain))
        if len(self._window) >= 4 * CONTEXT:
            self._window = self._window[-CONTEXT:]
            self._read = len(self._certain())
        return self._pass_on(new)

    def end(self) -> str:
        """What was held back, as nothing follows; empty behind a stop string."""
        if self.stopped:
            return ""
        rest = self._decoded()[self._read :]
        self._read += len(rest)
        given = self._pass_on(rest)
        held, self._held = self._held, ""
        self.text += held
        return given + held

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True)

    def _certain(self) -> str:
        text = self._decoded()
        unfinished = len(text) - len(text.rstrip(UNFINISHED))
        return text[: len(text) - min(unfinished, LONGEST)]

    def _pass_on(self, new: str) -> str:
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        self.stopped = bool(found)
        cut = min(found) if found else len(text) - self._begun(text)
        self._held = "" if found else text[cut:]
        self.text += text[:cut]
        return text[:cut]

    def _begun(self, text: str) -> int:
        """How many characters at the end of `text` may be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1)
        ends = (text[-n:] for n in range(min(longest - 1, len(text)), 0, -1))
        return next((len(end) for end in ends if any(s.startswith(end) for s in self._stop)), 0)


@dataclass(frozen=True)
class Ending:
    """What ends a sequence: one of the tokens `eos`, or a string of `stop` in its text.

    Where there is a tokenizer, sequences have a text. A stop string that is a special token of it,
    which no text has, counts as a token. Raises UsageError for stop strings that are empty, or
    without a tokenizer.
    """

    eos: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        if self.stop and self.tokenizer is None:
            raise UsageError(
                "stop strings need the tokenizer of the model",
                hint="give tokenizer=, or eos_token_id= in their place",
            )
        if "" in self.stop:
            raise UsageError("a stop string is empty", hint="leave it out")
        if self.tokenizer is not None:
            added = self.tokenizer.get_added_tokens_decoder().items()
            special = {token.content: i for i, token in added if token.special}
            tokens = {special[stop] for stop in self.stop if stop in special}
            object.__setattr__(self, "eos", self.eos | tokens)


class Continuation:
    """What one sequence has made: its `tokens`, with the one that ended it, and what did end it."""

    def __init__(self, ending: Ending, before: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self.ended: Literal["eos", "stop", "length"] | None = None
        self._eos: Collection[int] = ending.eos
        self._stream = (
            TextStream(ending.tokenizer, before, ending.stop) if ending.tokenizer else None
        )

    @property
    def text(self) -> str:
        """The text so far, without end-of-text token and stop string."""
        return self._stream.text if self._stream else ""

    def add(self, token: int) -> str:
        """What `token` adds to the text; nothing where the sequence has ended."""
        if self.ended:
            return ""
        self.tokens.append(token)
        if token in self._eos:
            self.ended = "eos"
            return ""
        given = self._stream.add(token) if self._stream else ""
        if self._stream and self._stream.stopped:
            self.ended = "stop"
        return given

    def finish(self) -> str:
        """The last of the text, as no token follows."""
        self.ended = self.ended or "length"
        return self._stream.end() if self._stream else ""
