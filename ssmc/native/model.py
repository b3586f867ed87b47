"""A program and its states: prompts and steps of one sequence."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmc.errors import UsageError
from ssmc.native.code import Code, check_processor
from ssmc.native.memory import Room, TensorFile, damaged
from ssmc.native.sampling import GREEDY, Sampling
from ssmc.native.threads import Entries, RunFunction, Threads, WorkFunction

SCHEMA = 1
PROGRAM, TENSORS, CODE, TOKENIZER = (
    "program.json", "model.safetensors", "code.safetensors", "tokenizer.json",
)  # fmt: skip
FILES = (PROGRAM, TENSORS, CODE, TOKENIZER)


def is_program(path: str | Path) -> bool:
    """Whether `path` is a folder that holds a native program."""
    return (Path(path) / CODE).is_file() and (Path(path) / PROGRAM).is_file()


@dataclass(frozen=True)
class _Call:
    """A recorded call: its launches, with what they read; where ids, logits and the choice are."""

    entries: Entries
    kept: list[Any]
    ids: Any
    logits: memoryview[float]
    token: Any


class NativeModel:
    """One sequence, which grows with every call.

    A prompt runs in pieces whose lengths are powers of two, each of them a recorded call. Code,
    weights and calls come from the folder that `ssmc export --format native` wrote.

    Raises ArtefactError naming the file that is missing or damaged, DeviceError for another
    processor.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        self.folder = folder
        self.about = _read(folder / PROGRAM)
        check_processor(**self.about["processor"])
        self._tensors, objects = TensorFile(folder / TENSORS), TensorFile(folder / CODE)
        self._code = Code(objects.data(name) for name in objects.places)
        self._states = Room(self.about["memory"]["states"])
        self._arena = Room(self.about["memory"]["arena"])
        self._calls: dict[int, _Call] = {}
        self._tapes = {tape["length"]: tape for tape in self.about["tapes"]}
        symbols = self.about["kernels"]
        self._kernels = {name: self._code.address(symbol) for name, symbol in symbols.items()}
        self._threads = Threads(
            threads or len(os.sched_getaffinity(0)),
            RunFunction(self._kernels["threads._run"]),
            WorkFunction(self._kernels["threads._work"]),
            self._code,
        )
        self.tokens = 0
        self._last: _Call | None = None

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return int(self.about["vocabulary"])

    @property
    def eos(self) -> int | None:
        """The id of the token that ends a text."""
        return None if self.about["eos"] is None else int(self.about["eos"])

    def tokenizer(self) -> Any:
        """The model's tokenizer, of the package tokenizers. Raises UsageError where it has none."""
        path = self.folder / TOKENIZER
        if not path.is_file():
            raise UsageError(
                f"{self.folder} has no tokenizer", hint="give token ids: NativeModel.generate"
            )
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(path))

    def reset(self) -> None:
        """Begin a new sequence."""
        self._states.clear()
        self.tokens = 0

    def prefill(self, ids: Sequence[int]) -> memoryview[float]:
        """Logits, float32 [vocabulary], behind `ids`, which follow what was there before.

        They are valid until the next call. Raises UsageError for ids that are none, and where more
        tokens come than caches have room for.
        """
        self._check(ids)
        start = 0
        for length in self._pieces(len(ids)):
            call = self._call(length)
            call.ids[:] = ids[start : start + length]
            self._threads.run(call.entries)
            start += length
        self.tokens += len(ids)
        self._last = call
        return call.logits

    def step(self, token: int) -> memoryview[float]:
        """Logits behind one more token."""
        return self.prefill([token])

    def likeliest(self) -> int:
        """The token that is likeliest behind the last call; the first of several.

        Raises UsageError where there was none.
        """
        if self._last is None:
            raise UsageError("nothing was run", hint="call prefill first")
        return int(self._last.token.value)

    def generate(
        self, ids: Sequence[int], max_new_tokens: int = 64, sampling: Sampling = GREEDY
    ) -> Iterator[int]:
        """What follows `ids` in a new sequence, token by token, up to and with an end of text."""
        self.reset()
        choose = sampling.drawing() if sampling.temperature > 0 else lambda _: self.likeliest()
        logits = self.prefill(ids)
        for made in range(1, max_new_tokens + 1):
            token = choose(logits)
            yield token
            if token == self.eos or made == max_new_tokens:
                return
            logits = self.step(token)

    # -- recorded calls -----------------------------------------------------------------------

    def _check(self, ids: Sequence[int]) -> None:
        if not ids:
            raise UsageError("the prompt is empty", hint="give at least one token")
        odd = next((i for i in ids if not 0 <= i < self.vocabulary), None)
        if odd is not None:
            raise UsageError(
                f"there is no token {odd}", hint=f"ids are from 0 to {self.vocabulary - 1}"
            )
        room = self.about["room"]
        if room is not None and self.tokens + len(ids) > room:
            raise UsageError(
                f"{self.tokens + len(ids)} tokens, and the program's caches have room for {room}",
                hint="begin anew with reset(), or run the artefact itself",
            )

    def _pieces(self, length: int) -> Iterator[int]:
        """Lengths of recorded calls, the longest first, which add up to `length`."""
        for size in sorted(self._tapes, reverse=True):
            count, length = divmod(length, size)
            yield from [size] * count

    def _call(self, length: int) -> _Call:
        if length not in self._calls:
            self._calls[length] = self._make(self._tapes[length])
        return self._calls[length]

    def _make(self, tape: dict[str, Any]) -> _Call:
        launches, kept = [], []
        for kernel, work, words in tape["launches"]:
            given = (ctypes.c_int64 * len(words))(*map(self._word, words))
            kept.append(given)
            launches.append((self._kernels[kernel], ctypes.addressof(given), work))
        ids, logits, token = (self._word(tape[name]) for name in ("ids", "logits", "token"))
        values = (ctypes.c_float * self.vocabulary).from_address(logits)
        return _Call(
            Entries(launches), kept, (ctypes.c_int64 * tape["length"]).from_address(ids),
            memoryview(values).cast("B").cast("f"), ctypes.c_int64.from_address(token),
        )  # fmt: skip

    def _word(self, word: Any) -> int:
        """A number, or the address that [segment, offset] stands for."""
        if not isinstance(word, list):
            return int(word)
        segment, offset = word
        if segment == "arena":
            return self._arena.address + int(offset)
        if segment == "states":
            return self._states.address + int(offset)
        return self._tensors.address(segment.removeprefix("tensor ")) + int(offset)


def load(folder: str | Path, threads: int | None = None) -> NativeModel:
    """The program in a folder, to run on `threads` threads (as many as there are processors)."""
    return NativeModel(Path(folder), threads)


def _read(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        schema = about["schema"]
    except OSError as error:
        raise damaged(path, f"cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise damaged(path, "is damaged") from None
    if schema != SCHEMA:
        raise damaged(path, f"has schema {schema}; this version reads {SCHEMA}")
    return dict(about)
