"""Variants of one calibrated model: each quantised by overrides of its own, and scored."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from ssmc.compiler import Prepared, Source
from ssmc.core import Graph, Pass
from ssmc.core.pipeline import apply_pass
from ssmc.corpus import read_texts, sample_windows, token_windows
from ssmc.device import move
from ssmc.errors import NumericsError, UsageError
from ssmc.passes.quantise import Quantise
from ssmc.recipe import Recipe
from ssmc.runtime.artefact import narrowest


@dataclass(frozen=True)
class Score:
    """What a variant loses against the float model on the same windows, and what it stores.

    `kl` is the mean Kullback-Leibler divergence (nats a token) of its predictions from those in
    float, `kl_error` the standard error of that mean over windows (None for one window).
    `perplexity` is the increase of perplexity, as a fraction. `bytes` is what its tensors take in
    an artefact.
    """

    kl: float
    kl_error: float | None
    perplexity: float
    bytes: int

    @property
    def loss(self) -> float:
        """The greater of the increase of perplexity and of exp(kl) - 1, a fraction.

        Where a model predicts text as well as it believes to, both have the same mean. The
        divergence compares whole distributions, so it cannot fall below zero by chance, as the
        increase of perplexity on few tokens does.
        """
        return max(self.perplexity, math.expm1(self.kl))


class Trials:
    """Scores overrides of `quantise` on windows [n, length], from one calibrated graph."""

    def __init__(self, prepared: Prepared, recipe: Recipe, windows: Tensor) -> None:
        self.graph = prepared.source.graph
        self.context = replace(prepared.context, progress=lambda done, total: None)
        self.rest = recipe.plan()[len(prepared.done) :]
        self.own = quantise_of(self.rest).overrides
        self.windows = windows.to(self.context.device)
        self.count = 0
        self._expected = [self._predict(prepared.reference, window) for window in self.windows]
        self._known: dict[tuple[str, ...], Score] = {}

    def label(self) -> str:
        """The passes that quantise, as on the command line."""
        return ",".join(str(p) for p in self.rest)

    def score(self, overrides: Iterable[str]) -> Score:
        """The score with overrides in place of the recipe's `own`; `count` counts new ones."""
        key = tuple(overrides)
        if key not in self._known:
            self.count += 1
            self._known[key] = self._score(self.variant(key))
        return self._known[key]

    def knows(self, overrides: Iterable[str]) -> bool:
        """Whether these overrides have been scored."""
        return tuple(overrides) in self._known

    def bytes(self, overrides: Iterable[str]) -> int:
        """Bytes stored with these overrides, without scoring them."""
        return stored_bytes(self.variant(tuple(overrides)))

    def plan(self, overrides: tuple[str, ...]) -> list[Pass]:
        """The passes that quantise with these overrides."""
        return with_overrides(self.rest, overrides)

    def variant(self, overrides: tuple[str, ...]) -> Graph:
        """The graph quantised with these overrides."""
        g = self.graph.copy()
        for p in self.plan(overrides):
            apply_pass(g, p, self.context)
        move(g, self.context.device)
        return g

    def _score(self, g: Graph) -> Score:
        kls, rises = [], []
        for window, expected in zip(self.windows, self._expected, strict=True):
            found = self._predict(g, window)
            kls.append(F.kl_div(found, expected, reduction="sum", log_target=True) / len(found))
            rises.append(_loss(found, window) - _loss(expected, window))
        kl, rise = (torch.stack(values).double() for values in (kls, rises))
        if not torch.isfinite(kl).all():
            raise NumericsError("a variant's predictions are NaN or infinite")
        error = (kl.std() / len(kl) ** 0.5).item() if len(kl) > 1 else None
        return Score(kl.mean().item(), error, math.expm1(rise.mean().item()), stored_bytes(g))

    @staticmethod
    def _predict(g: Graph, window: Tensor) -> Tensor:
        """Log probabilities [length - 1, vocabulary] of the tokens behind the first."""
        logits, _ = g(window[None, :-1])
        return F.log_softmax(logits[0].float(), -1)


def _loss(predicted: Tensor, window: Tensor) -> Tensor:
    return F.nll_loss(predicted, window[1:])


def stored_bytes(g: Graph) -> int:
    """Bytes that the tensors of a graph take in an artefact."""
    return sum(narrowest(tensor).nbytes for tensor in g.params().values())


def quantise_of(plan: Iterable[Pass]) -> Quantise:
    """The pass `quantise` of a plan; UsageError where there is none."""
    found = next((p for p in plan if isinstance(p, Quantise)), None)
    if found is None:
        raise UsageError("no pass quantise in the plan", hint="choose a --scheme other than none")
    return found


def with_overrides(plan: Iterable[Pass], overrides: tuple[str, ...]) -> list[Pass]:
    """The plan, with `overrides` in place of those that its `quantise` has."""
    return [replace(p, overrides=overrides) if isinstance(p, Quantise) else p for p in plan]


def held_out_windows(source: Source, recipe: Recipe, text: Path | None, limit: int) -> Tensor:
    """Up to `limit` windows [n, length] of `text`, or of what calibration left of its own text.

    Drawn with the recipe's seed. Raises UsageError where nothing is left.
    """
    from ssmc.demo import calibration_file

    path = text or Path(recipe.calibration or calibration_file())
    assert source.tokenizer is not None  # else calibration has refused it
    tokenizer = Tokenizer.from_str(source.tokenizer)
    cut = token_windows(tokenizer, read_texts(path), source.about["eos"], recipe.length, str(path))
    used = 0 if text else recipe.samples
    left = sample_windows(cut, used + limit, recipe.seed)[used:]
    if not len(left):
        raise UsageError(
            f"calibration uses all {len(cut)} windows of {path}, so none is left to score",
            hint="name another text, or use fewer --samples",
        )
    return left
