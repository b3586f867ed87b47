"""The format `native`: compiled kernels and recorded calls, which run without torch.

For each length of a piece of a prompt, and for a step, the launches of one call are recorded.
Their operands are weights, states, or results in between; these get places in one room by when
they are needed, so that a program takes little memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import ssmc
from ssmc.core import Graph
from ssmc.core.state import fresh_states
from ssmc.errors import SsmcError, UnsupportedError, UsageError
from ssmc.export import Exported
from ssmc.lowering.lower import find_backend
from ssmc.native.model import CODE, FILES, PROGRAM, SCHEMA, TENSORS, TOKENIZER
from ssmc.runtime import Artefact, CompiledModel
from ssmc.runtime.artefact import Kind, whole_folder, write_json
from ssmc.runtime.session import SMALLEST_PIECE, pieces

LARGEST_PIECE = 512  # tokens: the results of one call then take little memory
ROOM = 2048  # tokens that caches have room for
ALIGNMENT = 64  # bytes, of a cache line
CHECKED = (1, SMALLEST_PIECE, LARGEST_PIECE + SMALLEST_PIECE + 1)  # lengths of prompts
FOLDER = Kind("export", PROGRAM, FILES)
_ANSWER = """
import json, sys
from ssmc.native import load
model = load(sys.argv[1], 1)
for ids in json.load(sys.stdin):
    model.reset()
    sys.stdout.buffer.write(bytes(model.prefill(ids)))
"""

Word = int | tuple[str, int]
"""A number, or a segment of memory and an offset in bytes."""


def export(artefact: Artefact, out: Path, *, force: bool = False) -> Exported:
    """Write the program to the folder `out`, whole or not at all, and run it once.

    Raises UsageError without Numba and where `out` is taken, UnsupportedError where a call is not
    made of kernels alone.
    """
    if not find_backend("cpu").can_record(torch.device("cpu")):
        raise UsageError("the format native needs Numba", hint="pip install numba")
    model = CompiledModel(artefact, "cpu", "cpu")
    program = _Program(model)
    for length in lengths():
        program.record(length)
    with whole_folder(out, FOLDER, force=force) as folder:
        program.write(folder)
        if artefact.tokenizer is not None:
            (folder / TOKENIZER).write_text(artefact.tokenizer, encoding="utf-8")
        _check(model, folder)
    notes = [f"prompts and replies together have room for {ROOM} tokens"] if program.room else []
    return Exported(out, notes=notes)


def lengths() -> list[int]:
    """The lengths of calls: of a step, and of pieces of prompts."""
    sizes, size = [1], SMALLEST_PIECE
    while size <= LARGEST_PIECE:
        sizes.append(size)
        size *= 2
    return sizes


@dataclass
class Room:
    """Memory of one recorded call, and which of its launches need it, the first and the last."""

    start: int
    size: int
    first: int = sys.maxsize
    last: int = -1
    offset: int = 0

    def use(self, launch: int) -> None:
        """A launch reads or writes it."""
        self.first, self.last = min(self.first, launch), max(self.last, launch)


def place_rooms(rooms: Sequence[Room]) -> int:
    """Give rooms their offsets, apart where they are needed together; the bytes of all.

    The largest first, each as far down as there is place.
    """
    placed: list[Room] = []
    for room in sorted(rooms, key=lambda room: (-room.size, room.first)):
        beside = [o for o in placed if o.first <= room.last and room.first <= o.last]
        room.offset = 0
        for other in sorted(beside, key=lambda other: other.offset):
            if room.offset + room.size <= other.offset:
                break
            room.offset = max(room.offset, _aligned(other.offset + other.size))
        placed.append(room)
    return max((_aligned(room.offset + room.size) for room in placed), default=0)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass
class _Program:
    """What is recorded so far."""

    model: CompiledModel
    tapes: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    kernels: dict[str, Any] = field(default_factory=dict)
    arena: int = 0

    def __post_init__(self) -> None:
        specs = self.model.form("step").graph.states
        self.room = ROOM if any(spec.is_open for spec in specs) else None
        self.states = fresh_states(specs, 1, "cpu", ROOM)
        self.offsets, self.state_bytes = {}, 0
        for name, state in self.states.items():
            self.offsets[name] = self.state_bytes
            self.state_bytes += _aligned(state.nbytes)
        self.vocabulary = int(self.model.graph.result.meta["val"].shape[-1])

    def record(self, length: int) -> None:
        """Record the call that takes `length` tokens."""
        from ssmc.kernels.cpu.elementwise import argmax
        from ssmc.runtime.replay import TapeRecorder

        graph = self.model.form("step" if length == 1 else "last").graph
        recording = TapeRecorder(self.states, self.model.device).record(graph, (1, length))
        with recording.tape as tape:
            token = argmax(recording.logits)
        if tape.plain:
            raise UnsupportedError(
                f"the format native has no kernel for {', '.join(sorted(set(tape.plain)))}, which "
                "the cpu backend leaves to torch",
                hint="recipes that make everything int8 (W8A8) have kernels alone",
            )
        rooms = [Room(t.data_ptr(), t.nbytes) for t in (recording.ids, *tape.rooms)]
        places = _Places(self, graph, rooms)
        launches = [
            [kernel, work, words, arguments]
            for (_, _, work), (kernel, words, *arguments) in zip(
                tape.parts[0], tape.kept, strict=True
            )
        ]
        for number, (_, _, _, arguments) in enumerate(launches):
            for argument in arguments:
                if isinstance(argument, Tensor):
                    places.use(argument, number)
        rooms[0].use(-1)  # ids are there before
        for result in (recording.logits, token):  # and these are to be found afterwards
            places.use(result, len(launches))
        self.arena = max(
            self.arena, place_rooms([room for room in rooms if room.first <= room.last])
        )
        self.tapes.append(
            {
                "length": length,
                "ids": ("arena", rooms[0].offset),
                "logits": places.word(recording.logits),
                "token": places.word(token),
                "launches": [
                    [self._name(kernel), work, [
                        places.word(argument) if isinstance(argument, Tensor) else int(word)
                        for word, argument in zip(words, arguments, strict=True)
                    ]]
                    for kernel, work, words, arguments in launches
                ],
            }
        )  # fmt: skip

    def _name(self, kernel: Any) -> str:
        self.kernels[kernel.name] = kernel
        return str(kernel.name)

    def write(self, folder: Path) -> None:
        """Write program, tensors and code."""
        from ssmc.kernels.cpu import standalone
        from ssmc.kernels.cpu.threads import RUN, WORK
        from ssmc.native.code import processor

        code = {k.name: k.code() for k in (*self.kernels.values(), RUN, WORK)}
        objects = {name: data for name, (_, data) in code.items()}
        objects[standalone.NAME] = standalone.runtime()
        about = {
            "schema": SCHEMA,
            "versions": {"ssmc": ssmc.__version__},
            "source": self.model.about["source"]["name"],
            "eos": self.model.eos,
            "vocabulary": self.vocabulary,
            "room": self.room,
            "processor": processor(),
            "memory": {"states": self.state_bytes, "arena": self.arena},
            "kernels": {name: symbol for name, (symbol, _) in code.items()},
            "tapes": self.tapes,
        }
        write_json(folder / PROGRAM, about)
        save_file(self.tensors, folder / TENSORS)
        raw = {n: torch.frombuffer(bytearray(d), dtype=torch.uint8) for n, d in objects.items()}
        save_file(raw, folder / CODE)
        for name in (TENSORS, CODE):  # safetensors makes them private
            (folder / name).chmod((folder / PROGRAM).stat().st_mode)


class _Places:
    """Where in the program's memory the operands of one call are."""

    def __init__(self, program: _Program, graph: Graph, rooms: Sequence[Room]) -> None:
        self.program, self.rooms = program, rooms
        self.params = {name: t for name, t in graph.params().items() if t.is_contiguous()}

    def use(self, tensor: Tensor, launch: int) -> None:
        """A launch has an operand."""
        room = self._room(tensor)
        if room is not None:
            room.use(launch)

    def word(self, tensor: Tensor) -> Word:
        """The segment and the offset of an operand."""
        address = tensor.data_ptr()
        room = self._room(tensor)
        if room is not None:
            return "arena", room.offset + address - room.start
        for name, state in self.program.states.items():
            if _holds(state, address):
                offset: int = self.program.offsets[name]
                return "states", offset + address - state.data_ptr()
        for name, value in (self.program.tensors | self.params).items():
            if _holds(value, address):
                self.program.tensors.setdefault(name, value)
                return f"tensor {name}", address - value.data_ptr()
        return self._constant(tensor)

    def _room(self, tensor: Tensor) -> Room | None:
        address = tensor.data_ptr()
        return next((r for r in self.rooms if r.start <= address < r.start + r.size), None)

    def _constant(self, tensor: Tensor) -> Word:
        """What is neither weight nor result, with all that it is a part of."""
        whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        name = f"constant{len(self.program.tensors)}"
        self.program.tensors[name] = whole
        return f"tensor {name}", tensor.data_ptr() - whole.data_ptr()


def _holds(tensor: Tensor, address: int) -> bool:
    return tensor.data_ptr() <= address < tensor.data_ptr() + tensor.nbytes


def _check(model: CompiledModel, folder: Path) -> None:
    """Raise SsmcError unless the program, in a process of its own, gives the session's bits."""
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.graph.result.meta["val"].shape[-1]
    prompts = [torch.randint(0, vocabulary, (1, n), generator=draw) for n in CHECKED]
    command = [sys.executable, "-c", _ANSWER, str(folder)]
    given = json.dumps([prompt[0].tolist() for prompt in prompts])
    done = subprocess.run(command, input=given.encode(), capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["no word"]
        raise SsmcError(f"the program does not run: {said[-1]}")
    found = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).view(len(prompts), -1)
    session = model.session(1)
    for prompt, logits in zip(prompts, found, strict=True):
        session.reset()
        for piece in prompt.split(pieces_of(prompt.shape[1]), 1):
            expected = session.prefill(piece)[0].clone()
        if not torch.equal(logits, expected):
            raise SsmcError(
                f"the program gives other logits behind {prompt.shape[1]} tokens than the artefact",
                hint="this is a defect of ssmc",
            )


def pieces_of(length: int) -> list[int]:
    """The lengths of the calls in which a program takes a prompt."""
    return pieces(length, LARGEST_PIECE, SMALLEST_PIECE)
