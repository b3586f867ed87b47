"""A session: sequences that grow, with their states in buffers that stay where they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ssmc.core import Graph, States
from ssmc.core.state import extended_states, fresh_states
from ssmc.device import running_on
from ssmc.errors import UsageError
from ssmc.lowering import Form
from ssmc.runtime.capture import NotCapturableError, Recorder, Recording, advance, clear, overwrite
from ssmc.runtime.replay import TapeRecorder, TapeRecording

LARGEST_PIECE = 2048  # tokens: they fill a GPU, and bound the memory that a prompt takes
FIRST_ROOM = 512  # tokens a cache has room for at first
SMALLEST_PIECE = 16  # fewer tokens run one by one, which costs less than recordings of their own


class Session:
    """The states of `batch` sequences, which every call overwrites, and the calls.

    `programs` gives the graph of each form. Prompts run in pieces of at most `prefill_piece`
    tokens. With a `recorder` a call is recorded the first time its length occurs, and replayed from
    then on: as a CUDA graph, or on a CPU as a tape. Where that takes prompts too, the lengths of
    pieces are powers of two, so that a few recordings serve every prompt and nothing is padded.
    What cannot be recorded runs kernel by kernel, and a warning says why.

    States that hold a row for each token have room for a number of them. Where that is used up they
    move to buffers of twice the size, and calls are recorded anew.
    """

    def __init__(
        self,
        programs: Callable[[Form], Graph],
        batch: int,
        device: torch.device,
        *,
        recorder: type[Recorder] | type[TapeRecorder] | None = None,
        prefill_piece: int = LARGEST_PIECE,
    ) -> None:
        _check_sizes(batch, prefill_piece)
        self.batch, self.device, self.prefill_piece = batch, device, prefill_piece
        self._programs = programs
        self._recordings: dict[int, Recording | TapeRecording] = {}
        self._make_recorder = recorder
        self._specs = programs("step").states
        self._tokens, self._room = 0, FIRST_ROOM
        self._single: Session | None = None
        with running_on(device):
            self._use(fresh_states(self._specs, batch, device, self._room))

    def prefill(self, ids: Tensor) -> Tensor:
        """Logits [batch, vocabulary] behind `ids` [batch, length], valid until the next call.

        Goes on from the states. Raises UsageError for ids of another batch or without tokens,
        DeviceError where memory runs out.
        """
        self._check(ids)
        with running_on(self.device):
            self._make_room(ids.shape[1])
            for piece in self._cut(ids.to(self.device)):
                logits = self._advance(piece)
        return logits

    def prefill_each(self, prompts: Sequence[Tensor]) -> Tensor:
        """Logits [batch, vocabulary] behind prompts [length] of any lengths, one a sequence.

        What pads a prompt would change its states, so each runs by itself, in a session of one
        sequence (one set of recordings serves all), and its states come back into its row.
        """
        return torch.cat(self._each(prompts, lambda single, ids: single.prefill(ids).clone()))

    def score(self, ids: Tensor) -> Tensor:
        """Logits [batch, length, vocabulary] at every one of `ids` [batch, length].

        Otherwise as `prefill`, without recordings.
        """
        self._check(ids)
        with running_on(self.device):
            self._make_room(ids.shape[1])
            program = self._programs("sequence")
            pieces = ids.to(self.device).split(self.prefill_piece, 1)
            return torch.cat([advance(program, piece, self.states) for piece in pieces], 1)

    def score_each(self, prompts: Sequence[Tensor]) -> list[Tensor]:
        """Logits [length, vocabulary] at every one of the ids [length] of each sequence."""
        return self._each(prompts, lambda single, ids: single.score(ids)[0])

    def reorder(self, rows: Tensor) -> None:
        """Let sequence r go on from what sequence `rows[r]` has had, as beam search wants it."""
        rows = rows.to(self.device)
        overwrite(self.states, {name: s.index_select(0, rows) for name, s in self.states.items()})

    def _each(
        self, prompts: Sequence[Tensor], run: Callable[[Session, Tensor], Tensor]
    ) -> list[Tensor]:
        """What `run` gives for each prompt [length], in a session of its sequence alone."""
        if len(prompts) != self.batch:
            raise UsageError(
                f"{len(prompts)} prompts in a session of {self.batch} sequences",
                hint="give one for each sequence",
            )
        had, longest = self._tokens, max(len(ids) for ids in prompts)
        with running_on(self.device):
            self._make_room(longest)
        single = self._single = self._single or self._alone()
        single._extend(self._room)
        results = []
        for row, ids in enumerate(prompts):
            states = self._row(row)
            overwrite(single.states, states)
            single._tokens = had
            results.append(run(single, ids[None]))
            overwrite(states, single.states)
        return results

    def _alone(self) -> Session:
        return Session(
            self._programs,
            1,
            self.device,
            recorder=self._make_recorder,
            prefill_piece=self.prefill_piece,
        )

    def _row(self, row: int) -> States:
        return {name: state[row : row + 1] for name, state in self.states.items()}

    def step(self, ids: Tensor) -> Tensor:
        """Logits [batch, vocabulary] behind one more token a sequence, `ids` [batch, 1]."""
        return self.prefill(ids)

    def reset(self) -> None:
        """Start afresh: all states become zero."""
        self._tokens = 0
        clear(self.states)

    def _use(self, states: States) -> None:
        """Take buffers for the states; what was recorded on others is gone."""
        self.states = states
        self._recordings.clear()
        self._recorder = self._make_recorder(states, self.device) if self._make_recorder else None
        self._captured: set[Form] = set(self._recorder.forms) if self._recorder else set()

    def _make_room(self, tokens: int) -> None:
        """Let every sequence have room for so many more tokens than any has had."""
        self._tokens += tokens
        if self._tokens > self._room:
            self._extend(max(self._tokens, 2 * self._room))

    def _extend(self, room: int) -> None:
        """Give caches room for so many tokens, if they have less."""
        if room > self._room and any(spec.is_open for spec in self._specs):
            with running_on(self.device):
                self._use(extended_states(self._specs, self.states, room))
        self._room = max(room, self._room)

    def _check(self, ids: Tensor) -> None:
        if ids.dim() != 2 or ids.shape[0] != self.batch:
            raise UsageError(
                f"ids of shape {list(ids.shape)} in a session of {self.batch} sequences",
                hint="ids are [batch, length]; model.session(batch) opens another session",
            )
        if ids.shape[1] == 0:
            raise UsageError("the prompt is empty", hint="give at least one token")

    def _cut(self, ids: Tensor) -> Sequence[Tensor]:
        """The pieces in which ids [batch, length] run."""
        length, sizes = ids.shape[1], self.prefill_piece
        if length == 1:
            return (ids,)
        if self._recorder is None or "last" not in self._recorder.forms:
            return ids.split(sizes, 1)
        return ids.split(pieces(length, sizes, SMALLEST_PIECE), 1)

    def _advance(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        form: Form = "step" if length == 1 else "last"
        if form in self._captured and length not in self._recordings:
            self._record(form, length)
        if length in self._recordings:
            return self._recordings[length](ids)
        return advance(self._programs(form), ids, self.states)[:, -1]

    def _record(self, form: Form, length: int) -> None:
        assert self._recorder is not None
        try:
            recording = self._recorder.record(self._programs(form), (self.batch, length))
        except NotCapturableError as error:
            self._captured.discard(form)
            text = f"a call of {length} tokens cannot be recorded as a CUDA graph ({error})"
            warnings.warn(f"{text}: such calls run kernel by kernel", RuntimeWarning, stacklevel=4)
        else:
            self._recordings[length] = recording


def pieces(length: int, largest: int, smallest: int) -> list[int]:
    """`length` as a sum of powers of two from `largest` down to `smallest`, and of ones."""
    sizes, size = [], largest
    while size >= smallest:
        count, length = divmod(length, size)
        sizes += count * [size]
        size //= 2
    return sizes + length * [1]


def _check_sizes(batch: int, prefill_piece: int) -> None:
    if batch < 1:
        raise UsageError(f"a session of {batch} sequences", hint="use 1 or more")
    if prefill_piece < SMALLEST_PIECE or prefill_piece.bit_count() != 1:
        raise UsageError(
            f"prefill_piece {prefill_piece} is no power of two from {SMALLEST_PIECE} on",
            hint=f"{LARGEST_PIECE} is the default",
        )
