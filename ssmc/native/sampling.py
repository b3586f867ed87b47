"""Which token comes next, drawn by NumPy. Greedy choices need none: kernels make them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ssmc.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0, else drawn from softmax(logits / temperature).

    `top_k` keeps the k likeliest, then `top_p` the fewest likeliest whose probabilities reach p, as
    `ssmc.runtime.sampling.Sampling` has them. Raises UsageError for values out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        k = 1 if self.top_k is None else self.top_k
        if not (0 <= self.temperature < float("inf") and k >= 1 and 0 < self.top_p <= 1):
            raise UsageError(
                f"{self} is out of range",
                hint="temperature is 0 or more, top_k 1 or more, top_p above 0 and up to 1",
            )

    def drawing(self) -> Callable[[memoryview[float]], int]:
        """What draws a token from logits [vocabulary], by the seed from its beginning."""
        import numpy as np

        random = np.random.default_rng(self.seed)

        def choose(logits: memoryview[float]) -> int:
            scores = np.asarray(logits).astype(np.float64) / self.temperature
            order: Any = np.argsort(-scores, kind="stable")[: self.top_k]
            shares = np.exp(scores[order] - scores[order[0]])
            shares /= shares.sum()
            kept = int(np.searchsorted(np.cumsum(shares), self.top_p)) + 1
            shares = shares[:kept] / shares[:kept].sum()
            return int(order[random.choice(len(shares), p=shares)])

        return choose


GREEDY = Sampling()
