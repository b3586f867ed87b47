"""Is what is timed right? Logits against the reference backend on fresh random tokens."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from ssmc.bench.poison import poison_free_memory, poisoned
from ssmc.bench.subjects import Runner, Subject

STEPS = 4  # tokens after the prompt


class Oracle:
    """Logits of the reference for random prompts of one sequence, one for each length."""

    def __init__(self, reference: Subject, device: torch.device) -> None:
        self.reference, self.device = reference, device
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def answer(self, prompt: int) -> tuple[Tensor, Tensor]:
        """Tokens [1, prompt + STEPS] and the logits [STEPS + 1, vocabulary] behind the prompt."""
        if prompt not in self._known:
            shape = (1, prompt + STEPS)
            ids = torch.randint(0, self.reference.vocabulary, shape, device=self.device)
            self._known[prompt] = ids, _logits(self.reference.open(1), ids, prompt, 0)
        return self._known[prompt]

    def error(self, runner: Runner, batch: int, prompt: int) -> float:
        """The largest relative error ||a - b|| / ||b|| of a runner's logits; NaN is infinite.

        One sequence of the batch, any, is the reference's; the others are random. Memory that the
        runner asks for holds NaN.
        """
        ids, expected = self.answer(prompt)
        vocabulary, row = self.reference.vocabulary, int(torch.randint(batch, ()))
        tokens = torch.randint(0, vocabulary, (batch, ids.shape[1]), device=self.device)
        tokens[row] = ids[0]
        if self.device.type == "cuda":
            poison_free_memory(self.device)
        with contextlib.nullcontext() if self.device.type == "cuda" else poisoned():
            got = _logits(runner, tokens, prompt, row)
        return _relative_error(got, expected)


@torch.no_grad()
def _logits(runner: Runner, ids: Tensor, prompt: int, row: int) -> Tensor:
    runner.reset()
    found = [runner.prefill(ids[:, :prompt])[row].clone()]
    for t in range(prompt, ids.shape[1]):
        found.append(runner.step(ids[:, t : t + 1])[row].clone())
    return torch.stack(found).double()


def _relative_error(a: Tensor, b: Tensor) -> float:
    worst = ((a - b).norm(dim=-1) / b.norm(dim=-1)).max().item()
    return worst if math.isfinite(worst) else math.inf
