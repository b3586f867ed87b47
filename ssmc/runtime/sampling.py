"""Which token comes next: from logits to a choice, on the device that the logits are on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmc.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily at temperature 0, else drawn from softmax(logits / t).

    In the order in which they apply, each as transformers defines it:

    - `repetition_penalty`, above 1, makes what is in the prompt or was made less likely: its logits
      are divided by it where positive, else multiplied (CTRL, Keskar et al. 2019, arXiv 1909.05858,
      section 4.1; of logits below 0 the paper does not say);
    - `temperature`;
    - `top_k` keeps the k likeliest tokens;
    - `top_p` keeps the fewest likeliest whose probabilities reach p (nucleus sampling, Holtzman et
      al. 2020, arXiv 1904.09751, section 3.1);
    - `min_p` keeps those at least min_p times as likely as the likeliest (Nguyen et al. 2024, arXiv
      2407.01082).

    Sequence r of a batch draws by `seed` + r, whatever the others do and on any device.

    Raises UsageError for values out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check(
            0 <= self.temperature < math.inf,
            f"temperature {self.temperature} is not a number of 0 or more",
            "0 is greedy",
        )
        _check(
            self.top_k is None or self.top_k >= 1,
            f"top_k {self.top_k} keeps no token",
            "use 1 or more",
        )
        _check(
            0 < self.top_p <= 1, f"top_p {self.top_p} is no share above 0, up to 1", "1 keeps all"
        )
        _check(0 <= self.min_p <= 1, f"min_p {self.min_p} is not from 0 to 1", "0 keeps all")
        _check(
            0 < self.repetition_penalty < math.inf,
            f"repetition_penalty {self.repetition_penalty} is not above 0",
            "1 is none",
        )
        _check(0 <= self.seed < 2**63, f"seed {self.seed} is not from 0 to 2^63", "0 is usual")

    def scores(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """What logits [batch, vocabulary] become before the choice; -inf where not to be drawn.

        `seen` [batch, vocabulary] says which tokens the penalty applies to.
        """
        if seen is not None:
            penalty = self.repetition_penalty
            logits = torch.where(
                seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits
            )
        if self.temperature == 0:
            return logits
        logits = logits / self.temperature
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1:
            logits = logits.masked_fill(_outside_nucleus(logits, self.top_p), -torch.inf)
        if self.min_p > 0:
            shares = logits.softmax(-1)
            least = self.min_p * shares.amax(-1, keepdim=True)
            logits = logits.masked_fill(shares < least, -torch.inf)
        return logits


def _check(holds: bool, message: str, hint: str) -> None:
    if not holds:
        raise UsageError(message, hint=hint)


def _outside_nucleus(logits: Tensor, p: float) -> Tensor:
    ascending, order = logits.sort(-1)
    outside = ascending.softmax(-1).cumsum(-1) <= 1 - p
    outside[:, -1] = False  # the likeliest stays, however small p is
    return outside.scatter(-1, order, outside)


class Sampler:
    """Chooses the next tokens of a batch, at most `steps` of each sequence, without waiting for it.

    `contexts` has the tokens so far of each sequence, [length], on `device`.
    """

    def __init__(
        self, sampling: Sampling, contexts: Sequence[Tensor], steps: int, device: torch.device
    ) -> None:
        self.sampling = sampling
        self._contexts = contexts
        self._seen: Tensor | None = None
        drawn = steps if sampling.temperature > 0 else 0
        self._uniform = _uniform(sampling.seed, len(contexts), drawn).to(device)
        self._drawn = 0

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of each sequence [batch, 1] from logits [batch, vocabulary]."""
        logits = logits.float()
        if self.sampling.repetition_penalty != 1 and self._seen is None:
            self._seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, context in zip(self._seen, self._contexts, strict=True):
                row.scatter_(0, context, True)
        scores = self.sampling.scores(logits, self._seen)
        if self.sampling.temperature == 0:
            ids = scores.argmax(-1, keepdim=True)
        else:
            ids = draw(scores, self._uniform[self._drawn])
            self._drawn += 1
        if self._seen is not None:
            self._seen.scatter_(1, ids, True)
        return ids


def _uniform(seed: int, batch: int, steps: int) -> Tensor:
    """Numbers from 0 to 1, [steps, batch, 1] in float64; a column depends on seed + its index.

    Drawn on the host, so that a seed means the same on every device.
    """
    columns = [
        torch.rand(steps, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + row))
        for row in range(batch)
    ]
    return torch.stack(columns, 1)[..., None]


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """A token for each row [batch, 1], from softmax(scores [batch, vocabulary]).

    It is the first at which the probabilities add up to 1 - u, with u of `uniform` [batch, 1] in
    float64, from 0 up to but not 1: one of probability 0 is never it.
    """
    total = scores.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(total, (1 - uniform) * total[:, -1:])
