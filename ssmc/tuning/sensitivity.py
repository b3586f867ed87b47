"""What each block, operator or role costs by itself, and what all the others cost without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ssmc.core import Graph
from ssmc.passes._formats import FLOAT, Operator, operators
from ssmc.tuning.trials import Score, Trials

By = Literal["block", "operator", "role"]


@dataclass(frozen=True)
class Row:
    """A unit, how many operators it is, and the score of the variant about it."""

    unit: str
    operators: int
    score: Score


@dataclass(frozen=True)
class Sensitivity:
    """The score with everything quantised, and a row a unit, the most sensitive first."""

    everything: Score
    rows: list[Row]


def measure(
    trials: Trials,
    by: By = "block",
    *,
    leave_out: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sensitivity:
    """Score the units one by one, each quantised with everything else in float.

    With `leave_out` each is in float and everything else quantised. Quantised means as the recipe
    says, its own overrides included. Ranked by divergence: what it
    adds alone, or what is gone without it.
    """
    found, everything = units(trials.graph, by), operators(trials.graph)
    rows = []
    for done, (unit, members) in enumerate(found.items()):
        progress(done, len(found))
        left = members if leave_out else [o for o in everything if o not in members]
        score = trials.score((*trials.own, *(f"{o.node.name}:{FLOAT}" for o in left)))
        rows.append(Row(unit, len(members), score))
    progress(len(found), len(found))
    rows.sort(key=lambda row: row.score.kl, reverse=not leave_out)
    return Sensitivity(trials.score(trials.own), rows)


def units(g: Graph, by: By) -> dict[str, list[Operator]]:
    """The operators of a graph by unit: `layer.N` (`head`, ... by itself), address, or role."""
    names: dict[str, Callable[[Operator], str]] = {
        "block": lambda o: o.layer or o.address,
        "operator": lambda o: o.address,
        "role": lambda o: o.role,
    }
    found: dict[str, list[Operator]] = {}
    for operator in operators(g):
        found.setdefault(names[by](operator), []).append(operator)
    return found
