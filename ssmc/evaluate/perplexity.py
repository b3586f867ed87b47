"""Perplexity over windows of tokens, with the parallel scan or token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F

from ssmc.core.ranks import Ranks
from ssmc.core.saved import Saved
from ssmc.errors import NumericsError
from ssmc.runtime.generate import Model, lend_decoder

Mode = Literal["prefill", "recurrent"]


SHORTEST = 64
"""Tokens of the first range of lengths; each further one reaches twice as far."""


@dataclass(frozen=True)
class LengthRange:
    """Perplexity of the tokens that have `first` to `last` tokens before them."""

    first: int
    last: int
    perplexity: float


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss a window; the tokens scored; the windows; and by what went before.

    How perplexity goes on with the length shows what errors of the states add up to.
    """

    perplexity: float
    tokens: int
    windows: int
    by_length: tuple[LengthRange, ...]


def perplexity(
    model: Model,
    windows: torch.Tensor,
    mode: Mode = "prefill",
    batch: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks | None = None,
) -> Perplexity:
    """Perplexity of `model` on windows [n, length], the first token of each not scored.

    `model(ids, states=...)` gives logits [batch, length, vocabulary] and new states. In
    `recurrent` mode it sees one token at a time and carries the states, as in generation.
    Windows are moved to the device of a compiled model; `ranks` are processes that share them.
    Raises NumericsError where the loss is not finite.
    """
    ranks = ranks or Ranks()
    windows = windows.to(getattr(model, "device", windows.device))
    parts = []
    score = _prefill_loss if mode == "prefill" else _recurrent_loss
    starts = ranks.own(range(0, len(windows), batch))
    total = sum(len(windows[start : start + batch]) for start in starts)
    for start in starts:
        progress(start - starts[0], total)
        parts.append(score(model, windows[start : start + batch]))
    progress(total, total)
    mine = torch.cat(parts) if parts else windows[:0, 1:].float()
    every = [part.tensors["losses"] for part in ranks.gather(Saved({}, {"losses": mine}))]
    losses = torch.cat(every).double().mean(0)
    mean = losses.mean().item()
    if not math.isfinite(mean):
        raise NumericsError(
            "the loss is NaN or infinite", hint="`ssmc inspect --numerics` shows where"
        )
    tokens = windows[:, 1:].numel()
    return Perplexity(math.exp(mean), tokens, len(windows), tuple(_by_length(losses)))


def _by_length(losses: torch.Tensor) -> Iterator[LengthRange]:
    """The ranges of losses [length - 1], the first that of a token with one before it."""
    first = 1
    while first <= len(losses):
        last = min(max(SHORTEST, 2 * (first - 1)), len(losses))
        yield LengthRange(first, last, math.exp(losses[first - 1 : last].mean().item()))
        first = last + 1


def _prefill_loss(model: Model, windows: torch.Tensor) -> torch.Tensor:
    logits, _ = model(windows[:, :-1])
    return _token_loss(logits, windows[:, 1:])


def _recurrent_loss(model: Model, windows: torch.Tensor) -> torch.Tensor:
    losses = []
    with lend_decoder(model, len(windows)) as decoder:
        for token, target in pairwise(windows.split(1, 1)):
            losses.append(_token_loss(decoder.step(token)[:, None], target))
    return torch.cat(losses, 1)


def _token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
