"""Choose bits for each operator: as few stored bytes as a bound on the measured loss allows.

One change at a time is scored against the start, and changes are ordered by divergence added for
each byte saved. The longest run of them that keeps to the bound is found by bisection; those behind
it are then tried one by one. Every choice that is taken has been scored as a whole. Where the start
itself is above the bound, changes that lower the divergence are ordered by bytes instead, and the
shortest run that reaches the bound is taken. As in HAWQ-V2 (Dong et al. 2019, arXiv 1911.03852) the
order is that of each layer's own sensitivity; here it is measured instead of estimated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import fx

from ssmc.core import Graph
from ssmc.core.dialect import operands
from ssmc.errors import UsageError
from ssmc.passes._formats import (
    DEFAULT,
    FLOAT,
    Operator,
    choose,
    is_format,
    operators,
    read_override,
)
from ssmc.tuning.trials import Score, Trials

CANDIDATES = ("w8a8", "w4a8", "w4a16", "float")
EVALUATIONS = 200
RESERVE = 20
"""Of the evaluations, what is kept for whole choices once single changes are scored."""


@dataclass(frozen=True)
class Limits:
    """What a search keeps to; UsageError for candidates that are no formats.

    `max_loss` bounds `Score.loss`. `candidates` are formats of quantise's overrides; the search
    starts with the first for every operator. `evaluations` is the most variants it scores.
    """

    max_loss: float
    candidates: tuple[str, ...] = CANDIDATES
    evaluations: int = EVALUATIONS

    def __post_init__(self) -> None:
        for form in self.candidates:
            if form == DEFAULT or not is_format(form):
                raise UsageError(f"candidate '{form}' is no format", hint="as in w8a8,w4a8,float")
        if not self.candidates or self.evaluations < 1:
            raise UsageError("a search needs a candidate and an evaluation, at least")


@dataclass(frozen=True)
class Unit:
    """Operators that take the same format: those that read one weight. `size` counts its values."""

    operators: tuple[Operator, ...]
    size: int

    @property
    def name(self) -> str:
        """The addresses."""
        return ", ".join(o.address for o in self.operators)


Choice: TypeAlias = "dict[Unit, str]"
Progress: TypeAlias = "Callable[[int, int], None]"


@dataclass(frozen=True)
class Change:
    """One unit in another format than the start's, everything else as at the start."""

    unit: Unit
    format: str
    score: Score


@dataclass(frozen=True)
class Found:
    """What a search found: overrides, the format of each operator, their score, and the start's.

    `met` says whether the bound holds; where not, this is what lost least. `alone` has what each
    change that was scored did to the divergence by itself (nats a token), by unit and format.
    """

    overrides: tuple[str, ...]
    formats: dict[str, str]
    score: Score
    start: Score
    met: bool
    evaluations: int
    alone: dict[str, dict[str, float]]


def search(trials: Trials, limits: Limits, progress: Progress = lambda done, total: None) -> Found:
    """The choice with the fewest stored bytes found whose loss is at most `limits.max_loss`.

    What the recipe's own overrides name stays as they say. Deterministic: the same trials give the
    same choice.
    """
    return _Search(trials, limits, progress).run()


class _Search:
    def __init__(self, trials: Trials, limits: Limits, progress: Progress) -> None:
        self.trials, self.limits, self.progress = trials, limits, progress
        pinned = choose(trials.own, trials.graph)
        self.units = [
            u for u in shared_units(trials.graph) if not any(o.node in pinned for o in u.operators)
        ]
        self.first = limits.candidates[0]
        self.planned = limits.evaluations
        self.start = self._score({})
        self.best: Choice = {}

    def run(self) -> Found:
        """Shrink the start where it holds, else repair it."""
        holds = self._holds(self.start)
        changes = [*self._smaller()] if holds else [*self._closer()]
        if holds:
            self._shrink(changes)
        else:
            self._repair(changes)
        self.progress(self.trials.count, self.trials.count)
        score = self._score(self.best)
        taken = choose(self._overrides(self.best), self.trials.graph)
        formats = {o.address: taken[o.node].format for o in operators(self.trials.graph)}
        alone: dict[str, dict[str, float]] = {}
        for change in changes:
            added = change.score.kl - self.start.kl
            alone.setdefault(change.unit.name, {})[change.format] = added
        return Found(
            self._overrides(self.best), formats, score, self.start, self._holds(score),
            self.trials.count, alone,
        )  # fmt: skip

    def _holds(self, score: Score) -> bool:
        return score.loss <= self.limits.max_loss

    def _overrides(self, choice: Choice) -> tuple[str, ...]:
        taken = [u for u in self.units if u in choice]
        single = [f"{o.address}:{choice[u]}" for u in taken for o in u.operators]
        return (f"*:{self.first}", *self.trials.own, *single)

    def _score(self, choice: Choice) -> Score:
        score = self.trials.score(self._overrides(choice))
        self.progress(min(self.trials.count, self.planned), self.planned)
        return score

    def _left(self, reserve: int = 0) -> bool:
        return self.trials.count < self.limits.evaluations - reserve

    def _changes(self, pairs: Iterable[tuple[Unit, str]]) -> Iterator[Change]:
        reserve = min(RESERVE, self.limits.evaluations // 2)
        pairs = list(pairs)
        self.planned = min(self.limits.evaluations, 1 + len(pairs) + reserve)
        for unit, form in pairs:
            if not self._left(reserve):
                return
            yield Change(unit, form, self._score({unit: form}))

    # -- from a start that holds: fewer bytes -------------------------------------------------

    def _smaller(self) -> Iterator[Change]:
        """Changes that store less, the largest tensors first."""
        pairs = ((u, c) for u in self.units for c in self.limits.candidates[1:] if c != FLOAT)
        saving = (p for p in pairs if p[0].size and self._saves(*p))
        return self._changes(saving)

    def _saves(self, unit: Unit, form: str) -> bool:
        few = _weight_bits(form) < _weight_bits(self.first)
        return few and self.trials.bytes(self._overrides({unit: form})) < self.start.bytes

    def _shrink(self, changes: Sequence[Change]) -> None:
        def price(change: Change) -> tuple[float, int]:
            saved = self.start.bytes - change.score.bytes
            return max(change.score.kl - self.start.kl, 0.0) / saved, -saved

        ordered = sorted(changes, key=price)
        runs = _runs(ordered, lambda new, old: new.score.bytes < old.score.bytes)
        taken = self._longest(runs)
        self.best = runs[taken]
        for change in ordered:
            self._try(change, {c.unit: c for c in ordered if self.best.get(c.unit) == c.format})

    def _longest(self, runs: Sequence[Choice]) -> int:
        """The last of the runs that hold, if those behind one that does not do not either."""
        low, high = 0, len(runs)
        while high - low > 1 and self._left():
            middle = (low + high) // 2
            low, high = (middle, high) if self._holds(self._score(runs[middle])) else (low, middle)
        return low

    def _try(self, change: Change, taken: dict[Unit, Change]) -> None:
        """Add one change where it still saves and is not known to be too much."""
        old = taken[change.unit].score if change.unit in taken else self.start
        current = self._score(self.best)
        added = max(change.score.kl - old.kl, 0.0)
        too_much = math.expm1(current.kl + added) > self.limits.max_loss
        if change.score.bytes >= old.bytes or too_much or not self._left():
            return
        choice = self.best | {change.unit: change.format}
        score = self._score(choice)
        if self._holds(score) and score.bytes < current.bytes:
            self.best = choice

    # -- from a start that does not: less loss ------------------------------------------------

    def _closer(self) -> Iterator[Change]:
        """Changes that might lose less."""
        return self._changes((u, c) for u in self.units for c in self.limits.candidates[1:])

    def _repair(self, changes: Sequence[Change]) -> None:
        def price(change: Change) -> float:
            return (change.score.bytes - self.start.bytes) / (self.start.kl - change.score.kl)

        better = sorted((c for c in changes if c.score.kl < self.start.kl), key=price)
        runs = _runs(better, lambda new, old: new.score.kl < old.score.kl)
        if FLOAT in self.limits.candidates:
            runs.append(dict.fromkeys(self.units, FLOAT))
        low, high = 0, len(runs) - 1
        while high - low > 1 and self._left():
            middle = (low + high) // 2
            low, high = (low, middle) if self._holds(self._score(runs[middle])) else (middle, high)
        tried = [run for run in runs if self.trials.knows(self._overrides(run))]
        holds = self._holds(self._score(runs[high]))
        self.best = runs[high] if holds else min(tried, key=lambda run: self._score(run).loss)


def _runs(ordered: Iterable[Change], improves: Callable[[Change, Change], bool]) -> list[Choice]:
    """Ever more of the changes taken, from none on; of those of a unit the best so far."""
    runs: list[Choice] = [{}]
    taken: dict[Unit, Change] = {}
    for change in ordered:
        old = taken.get(change.unit)
        if old is None or improves(change, old):
            taken[change.unit] = change
            runs.append({unit: c.format for unit, c in taken.items()})
    return runs


def _weight_bits(form: str) -> int:
    bits = read_override(f"*:{form}").bits
    return bits.weights if bits else 32


def shared_units(g: Graph) -> list[Unit]:
    """The operators of a graph, those together that read the same weight, largest first."""
    groups: dict[fx.Node, list[Operator]] = {}
    for operator in operators(g):
        weight = operands(operator.node).get("weight", operator.node)
        groups.setdefault(weight, []).append(operator)
    units = [Unit(tuple(members), _size(g, weight)) for weight, members in groups.items()]
    return sorted(units, key=lambda unit: -unit.size)


def _size(g: Graph, weight: fx.Node) -> int:
    return g.param(weight).numel() if weight.op == "get_attr" else 0
