"""Compile a Mamba that is in no library: a bidirectional one, which puts breaks back into text.

    python examples/word_breaks.py

The model reads `inthebeginninggodcreatedtheheavensandtheearth` and says of each letter what stands
behind it: nothing, a space, or a mark such as a comma or a full stop. It differs from every
published language model: LayerNorm with a bias, biases on every projection, a convolution that is
centred instead of causal, a scan in both directions, and a head that classifies each position. Its
weights were trained by `tools/train_word_breaks.py` on text that comes with ssmc.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import ssmc
import ssmc.demo
from ssmc import ops

WEIGHTS = Path(__file__).with_suffix(".safetensors")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
BREAKS = ("", " ", ", ")
"""What stands behind a letter: nothing, a space, or a mark."""


class Scan(nn.Module):
    """A selective scan in one direction, with what computes its step size, B and C from u."""

    def __init__(self, width: int, rank: int, states: int, reverse: bool) -> None:
        super().__init__()
        self.reverse = reverse
        self.sizes = [rank, states, states]
        self.x_proj = nn.Linear(width, sum(self.sizes))
        self.dt_proj = nn.Linear(rank, width)
        nn.init.uniform_(self.dt_proj.bias, -5, -1)
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))

    def forward(self, u: Tensor) -> Tensor:
        """[batch, length, width] to the same."""
        dt, B, C = self.x_proj(u).split(self.sizes, dim=-1)
        A = -torch.exp(self.A_log)
        return ops.selective_scan(u, self.dt_proj(dt), A, B, C, self.D, reverse=self.reverse)[0]


class Mixer(nn.Module):
    """A convolution that sees as far ahead as back, and two scans, one from each end."""

    def __init__(self, d_model: int, width: int, rank: int, states: int, taps: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d_model, 2 * width)
        self.conv = nn.Conv1d(width, width, taps, groups=width)
        self.scans = nn.ModuleList(Scan(width, rank, states, reverse) for reverse in (False, True))
        self.out_proj = nn.Linear(width, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, d_model] to the same."""
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        u = self.centred(u)
        y = self.scans[0](u) + self.scans[1](u)
        return self.out_proj(y * F.silu(gate))

    def centred(self, u: Tensor) -> Tensor:
        """The causal convolution of what is `ahead` zeros longer, read so many positions later."""
        ahead = self.conv.kernel_size[0] // 2
        kernel = self.conv.weight.squeeze(1)
        padded = F.pad(u, (0, 0, 0, ahead))
        return ops.causal_conv1d(padded, kernel, self.conv.bias, activation="silu")[0][:, ahead:]


class WordBreaks(nn.Module):
    """Letters [batch, length] as integers to scores [batch, length, BREAKS] of what follows."""

    def __init__(
        self, d_model: int = 64, layers: int = 2, rank: int = 8, states: int = 8, taps: int = 5
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(LETTERS), d_model)
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(layers))
        self.mixers = nn.ModuleList(
            Mixer(d_model, 2 * d_model, rank, states, taps) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, len(BREAKS))

    def forward(self, letters: Tensor) -> Tensor:
        """Scores of the breaks, position by position."""
        x = self.embedding(letters)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return self.head(self.norm(x))


def windows(file: Path, length: int = 256) -> tuple[Tensor, Tensor]:
    """Letters and the breaks behind them, each [n, length], from a file of JSON lines."""
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    letters: list[int] = []
    breaks: list[int] = []
    for character in " ".join(texts).lower():
        if character in LETTERS:
            letters.append(LETTERS.index(character))
            breaks.append(0)
        elif letters and not character.isalnum() and character not in "'’-":
            breaks[-1] = max(breaks[-1], 1 if character.isspace() else 2)
    whole = len(letters) // length * length
    x, y = (torch.tensor(values[:whole]).view(-1, length) for values in (letters, breaks))
    return x, y


def load() -> WordBreaks:
    """The trained model."""
    model = WordBreaks()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def accuracy(scores: Tensor, breaks: Tensor) -> float:
    """The share of positions whose break is right."""
    return (scores.argmax(-1) == breaks).double().mean().item()


def written(letters: Tensor, scores: Tensor) -> str:
    """The text of one window, [length], with its breaks."""
    found = zip(letters.tolist(), scores.argmax(-1).tolist(), strict=True)
    return "".join(LETTERS[letter] + BREAKS[kind] for letter, kind in found)


@dataclass(frozen=True)
class Comparison:
    """The model before and after compilation, on text it has not seen."""

    compiled: ssmc.CompiledModel
    letters: Tensor
    float_scores: Tensor
    int8_scores: Tensor
    float_accuracy: float
    int8_accuracy: float


@torch.no_grad()
def compare(passes: str = "hadamard,percentile", count: int = 64) -> Comparison:
    """Compile the model, and compare the two on `count` windows."""
    model = load()
    calibration, _ = windows(ssmc.demo.calibration_file())
    compiled = ssmc.compile(model, calibration[:2], passes=passes, calibration=calibration[:64])
    letters, breaks = (x[:count] for x in windows(ssmc.demo.evaluation_file()))
    expected, (scores, _) = model(letters), compiled(letters)
    right = accuracy(expected, breaks), accuracy(scores, breaks)
    return Comparison(compiled, letters, expected, scores, *right)


def main() -> None:
    """Print a window of text, what was lowered, and what it cost."""
    result = compare()
    print(written(result.letters[0], result.int8_scores[0])[:200])
    print(f"lowered to integers: {', '.join(result.compiled.lowered.fused)}")
    for kept in result.compiled.lowered.kept:
        print(f"kept in float: {kept['node']}: {kept['reason']}")
    print(f"accuracy: float {result.float_accuracy:.4f}, int8 {result.int8_accuracy:.4f}")


if __name__ == "__main__":
    main()
