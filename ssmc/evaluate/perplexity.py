"""Perplexity over windows of tokens, with the parallel scan or token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from ssmc.core.state import States
from ssmc.errors import NumericsError

Mode = Literal["prefill", "recurrent"]
Model = Callable[..., tuple[torch.Tensor, States]]


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss a window; the tokens scored; the windows."""

    perplexity: float
    tokens: int
    windows: int


def perplexity(
    model: Model,
    windows: torch.Tensor,
    mode: Mode = "prefill",
    batch: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Perplexity of `model` on windows [n, length], the first token of each not scored.

    `model(ids, states=...)` gives logits [batch, length, vocabulary] and new states. In
    `recurrent` mode it sees one token at a time and carries the states, as in generation.
    Raises NumericsError where the loss is not finite.
    """
    losses = []
    score = _prefill_loss if mode == "prefill" else _recurrent_loss
    for start in range(0, len(windows), batch):
        progress(start, len(windows))
        losses.append(score(model, windows[start : start + batch]))
    progress(len(windows), len(windows))
    mean = torch.cat(losses).double().mean().item()
    if not math.isfinite(mean):
        raise NumericsError(
            "the loss is NaN or infinite", hint="`ssmc inspect --numerics` shows where"
        )
    return Perplexity(math.exp(mean), windows[:, 1:].numel(), len(windows))


def _prefill_loss(model: Model, windows: torch.Tensor) -> torch.Tensor:
    logits, _ = model(windows[:, :-1])
    return _token_loss(logits, windows[:, 1:]).mean(1)


def _recurrent_loss(model: Model, windows: torch.Tensor) -> torch.Tensor:
    states: States | None = None
    losses = []
    for t in range(windows.shape[1] - 1):
        logits, states = model(windows[:, t : t + 1], states=states)
        losses.append(_token_loss(logits, windows[:, t + 1 : t + 2]))
    return torch.cat(losses, 1).mean(1)


def _token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
