"""Generation: the prompt in one call, then one token a call, states carried along."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from ssmc.core.state import States
from ssmc.errors import UsageError

Model = Callable[..., tuple[torch.Tensor, States]]


class Decoder(Protocol):
    """Sequences and their states: each call takes ids [batch, length], gives logits behind them."""

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [batch, vocabulary] behind a prompt, valid until the next call."""

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """The same behind one token a sequence."""


@runtime_checkable
class HasSessions(Protocol):
    """A model that decodes in sessions of its own: a CompiledModel."""

    def lend_session(self, batch: int) -> AbstractContextManager[Decoder]:
        """A fresh session of `batch` sequences, for as long as the context lasts."""


class _Calls:
    """A model that is only called, `model(ids, states=...)` to logits and states, as a Decoder."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.states: States | None = None

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        logits, self.states = self.model(ids, states=self.states)
        return logits[:, -1]

    step = prefill


def lend_decoder(model: Model | HasSessions, batch: int) -> AbstractContextManager[Decoder]:
    """Fresh sequences of `model`: a session where it has them, else calls that carry the states."""
    if isinstance(model, HasSessions):
        return model.lend_session(batch)
    return contextlib.nullcontext(_Calls(model))


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily at temperature 0, else drawn from softmax(logits / t).

    `top_k` keeps the k likeliest tokens. Raises UsageError for values out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UsageError(
                f"temperature {self.temperature} is not a number of 0 or more", hint="0 is greedy"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k {self.top_k} keeps no token", hint="use 1 or more")

    def choose(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The next token of each sequence [batch, 1] from logits [batch, vocabulary]."""
        if self.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        return torch.multinomial((logits / self.temperature).softmax(-1), 1, generator=generator)


def stream(
    model: Model, ids: torch.Tensor, tokens: int, sampling: Sampling | None = None
) -> Generator[torch.Tensor, None, None]:
    """The next `tokens` tokens of sequences `ids` [batch, length], each [batch, 1] as it comes.

    They are on the model's device. Raises UsageError for an empty prompt.
    """
    if ids.shape[1] == 0:
        raise UsageError("the prompt is empty", hint="give at least one token")
    sampling = sampling or Sampling()
    with lend_decoder(model, len(ids)) as decoder:
        logits = decoder.prefill(ids)
        generator = torch.Generator(logits.device).manual_seed(sampling.seed)
        for left in reversed(range(tokens)):
            ids = sampling.choose(logits.float(), generator)
            yield ids
            if left:
                logits = decoder.step(ids)


def generate(
    model: Model,
    ids: torch.Tensor,
    tokens: int,
    sampling: Sampling | None = None,
    eos: int | None = None,
) -> torch.Tensor:
    """`ids` [batch, length] with up to `tokens` tokens behind; ends when every row had `eos`.

    Behind its first `eos` a row holds `eos` only.
    """
    made: list[torch.Tensor] = []
    with contextlib.closing(stream(model, ids, tokens, sampling)) as following:
        for token in following:
            if eos is not None and made:
                token = token.masked_fill(made[-1] == eos, eos)
            made.append(token)
            if eos is not None and bool((token == eos).all()):
                break
    return torch.cat([ids, *(token.to(ids.device) for token in made)], 1)
