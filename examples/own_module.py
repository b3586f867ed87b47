"""Compile a module of your own: a small sequence tagger, with no Hugging Face in it.

    python examples/own_module.py

The tagger reads a sequence of symbols, four of which are marks, and tags each position with the
mark seen last. It solves this as selective state-space models do: the step size is large at a mark,
so that the state takes it in and forgets the one before, and next to zero elsewhere. Step size and
head are fitted by least squares, the rest is random, so the example needs no training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssmc
from ssmc import ops

SYMBOLS, MARKS = 16, 4


class Tagger(nn.Module):
    """Embedding, causal convolution, selective scan, head: ids [B, L] to scores [B, L, MARKS]."""

    def __init__(self, width: int = 96, rank: int = 8, taps: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, width)
        self.conv = nn.Conv1d(width, width, taps, groups=width)
        self.step = nn.Linear(width, width)
        self.select = nn.Linear(width, 2 * rank)
        nn.init.ones_(self.select.bias)
        self.A_log = nn.Parameter(torch.zeros(width, rank))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, MARKS)

    def inputs(self, ids: Tensor) -> Tensor:
        """What the scan reads, [B, L, width]."""
        x, kernel = self.embedding(ids), self.conv.weight.squeeze(1)
        return ops.causal_conv1d(x, kernel, self.conv.bias, activation="silu")[0]

    def features(self, ids: Tensor) -> Tensor:
        """What the head reads, [B, L, width]."""
        u = self.inputs(ids)
        B, C = self.select(u).chunk(2, dim=-1)
        y, _ = ops.selective_scan(u, self.step(u), -torch.exp(self.A_log), B, C)
        return self.norm(y)

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of the marks at each position."""
        return self.head(self.features(ids))


def sequences(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random ids [count, length], and the mark seen last at each position, -1 before the first."""
    ids = torch.randint(SYMBOLS, (count, length), generator=torch.Generator().manual_seed(seed))
    last = torch.where(ids < MARKS, torch.arange(length), -1).cummax(1).values
    return ids, torch.where(last < 0, -1, ids.gather(1, last.clamp(min=0)))


@torch.no_grad()
def fit(tagger: Tagger) -> None:
    """Fit the step size to the marks, then the head to the tags."""
    ids, tags = sequences(128, 64, seed=0)
    step = torch.where(ids < MARKS, 3.0, -8.0)
    solve(tagger.step, tagger.inputs(ids), step[..., None].expand(-1, -1, tagger.step.out_features))
    known = tags >= 0
    solve(tagger.head, tagger.features(ids)[known], F.one_hot(tags[known], MARKS).float())


def solve(layer: nn.Linear, x: Tensor, y: Tensor) -> None:
    """Set a linear layer to what maps x [..., K] to y [..., N] best in the least-squares sense."""
    x = F.pad(x.flatten(0, -2), (0, 1), value=1.0)
    solution = torch.linalg.lstsq(x.double(), y.flatten(0, -2).double()).solution.float()
    layer.weight.copy_(solution[:-1].T)
    layer.bias.copy_(solution[-1])


def accuracy(scores: Tensor, tags: Tensor) -> float:
    """The share of positions from the first mark on that are tagged right."""
    known = tags >= 0
    return (scores.argmax(-1) == tags)[known].double().mean().item()


@dataclass(frozen=True)
class Comparison:
    """The module before and after compilation, on sequences it has not seen."""

    compiled: ssmc.CompiledModel
    float_accuracy: float
    int8_accuracy: float
    error: float


def compare(passes: str = "absmax") -> Comparison:
    """Make a tagger, compile it, and compare the two."""
    torch.manual_seed(0)
    tagger = Tagger().eval()
    fit(tagger)
    calibration, _ = sequences(32, 64, seed=1)
    compiled = ssmc.compile(tagger, calibration[:2], passes=passes, calibration=calibration)
    ids, tags = sequences(128, 96, seed=2)
    with torch.no_grad():
        expected = tagger(ids)
    scores, _ = compiled(ids)
    error = ((scores - expected).norm() / expected.norm()).item()
    return Comparison(compiled, accuracy(expected, tags), accuracy(scores, tags), error)


def main() -> None:
    """Print what was lowered and what it cost."""
    result = compare()
    print(f"lowered to integers: {', '.join(result.compiled.lowered.fused)}")
    for kept in result.compiled.lowered.kept:
        print(f"kept in float: {kept['node']}: {kept['reason']}")
    print(f"accuracy: float {result.float_accuracy:.3f}, int8 {result.int8_accuracy:.3f}")
    print(f"relative error of the scores: {result.error:.1e}")


if __name__ == "__main__":
    main()
