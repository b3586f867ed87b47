"""Generation: the prompt in one call, then one token a call, states carried along."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ssmc.core.state import States
from ssmc.errors import UsageError
from ssmc.runtime.sampling import Sampler, Sampling
from ssmc.runtime.text import Continuation

Model = Callable[..., tuple[Tensor, States]]


class Decoder(Protocol):
    """Sequences and their states: each call takes ids [batch, length], gives logits behind them."""

    def prefill(self, ids: Tensor) -> Tensor:
        """Logits [batch, vocabulary] behind a prompt, valid until the next call."""

    def step(self, ids: Tensor) -> Tensor:
        """The same behind one token a sequence."""


class Sequences(Decoder, Protocol):
    """A decoder whose sequences may have prompts of different lengths, and start afresh."""

    def prefill_each(self, prompts: Sequence[Tensor]) -> Tensor:
        """Logits [batch, vocabulary] behind prompts [length], one for each sequence."""

    def reset(self) -> None:
        """Start afresh."""


@runtime_checkable
class HasSessions(Protocol):
    """A model that decodes in sessions of its own: a CompiledModel."""

    def lend_session(self, batch: int) -> AbstractContextManager[Sequences]:
        """A fresh session of `batch` sequences, for as long as the context lasts."""


class _Calls:
    """A model that is only called, `model(ids, states=...)` to logits and states, as Sequences."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.states: States | None = None

    def prefill(self, ids: Tensor) -> Tensor:
        logits, self.states = self.model(ids, states=self.states)
        return logits[:, -1]

    step = prefill

    def prefill_each(self, prompts: Sequence[Tensor]) -> Tensor:
        rows = [
            self.model(ids[None], states=self._row(row, len(prompts)))
            for row, ids in enumerate(prompts)
        ]
        names = rows[0][1]
        self.states = {name: torch.cat([states[name] for _, states in rows]) for name in names}
        return torch.cat([logits[:, -1] for logits, _ in rows])

    def _row(self, row: int, batch: int) -> States | None:
        if self.states is None:
            return None
        return {name: state.split(1)[row] for name, state in self.states.items()}

    def reset(self) -> None:
        self.states = None


def lend_decoder(model: Model | HasSessions, batch: int) -> AbstractContextManager[Sequences]:
    """Fresh sequences of `model`: a session where it has them, else calls that carry the states."""
    if isinstance(model, HasSessions):
        return model.lend_session(batch)
    return contextlib.nullcontext(_Calls(model))


def stream(
    model: Model, prompts: Tensor | Sequence[Tensor], tokens: int, sampling: Sampling | None = None
) -> Generator[Tensor, None, None]:
    """The next `tokens` tokens of each prompt, [batch, 1] as they come.

    `prompts` are ids [batch, length], or [length] each where lengths differ: no prompt is padded,
    so what follows one does not depend on the others. Tokens are on the model's device, and
    nothing waits for it. Raises UsageError for an empty prompt.
    """
    if any(len(ids) == 0 for ids in prompts):
        raise UsageError("the prompt is empty", hint="give at least one token")
    with lend_decoder(model, len(prompts)) as decoder:
        logits = _prefill(decoder, prompts)
        contexts = [ids.to(logits.device) for ids in prompts]
        sampler = Sampler(sampling or Sampling(), contexts, tokens, logits.device)
        yield from decode(decoder, logits, sampler, tokens)


def _prefill(decoder: Sequences, prompts: Tensor | Sequence[Tensor]) -> Tensor:
    if len({len(ids) for ids in prompts}) > 1:
        return decoder.prefill_each(list(prompts))
    return decoder.prefill(torch.stack(list(prompts)))


def decode(
    decoder: Decoder, logits: Tensor, sampler: Sampler, tokens: int
) -> Generator[Tensor, None, None]:
    """`tokens` tokens of each sequence, [batch, 1] as they come, from the logits behind a prompt.

    The decoder has run all of them but the last that came.
    """
    for left in reversed(range(tokens)):
        ids = sampler.choose(logits)
        yield ids
        if left:
            logits = decoder.step(ids)


def follow(
    tokens: Generator[Tensor, None, None],
    rows: Sequence[Continuation],
    until: Callable[[], bool] = lambda: False,
) -> Iterator[list[str]]:
    """Add `tokens`, [batch, 1] as they come, to `rows`; the text that each adds to its row.

    Ends with the tokens, or when all rows have ended, or when `until()`. Waits for the device once
    a token.
    """
    with contextlib.closing(tokens):
        for ids in tokens:
            yield [row.add(i) for row, i in zip(rows, ids.flatten().tolist(), strict=True)]
            if until() or all(row.ended for row in rows):
                return


def pad(rows: Iterable[Sequence[int]], filler: int) -> Tensor:
    """Rows of tokens as one tensor [rows, longest], filled up behind."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filler)
