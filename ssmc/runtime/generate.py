"""Generation: the prompt in one call, then one token a call, states carried along."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ssmc.core.state import States
from ssmc.errors import UsageError

Model = Callable[..., tuple[torch.Tensor, States]]


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
) -> Iterator[torch.Tensor]:
    """The next `tokens` tokens of sequences `ids` [batch, length], each [batch, 1] as it comes.

    Raises UsageError for an empty prompt.
    """
    if ids.shape[1] == 0:
        raise UsageError("the prompt is empty", hint="give at least one token")
    sampling = sampling or Sampling()
    generator = torch.Generator(ids.device).manual_seed(sampling.seed)
    states: States | None = None
    for _ in range(tokens):
        logits, states = model(ids, states=states)
        ids = sampling.choose(logits[:, -1].float(), generator)
        yield ids


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
    sequences, ended = [ids], torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
    for token in stream(model, ids, tokens, sampling):
        if eos is not None:
            token = token.masked_fill(ended, eos)
            ended |= token == eos
        sequences.append(token)
        if ended.all():
            break
    return torch.cat(sequences, 1)
