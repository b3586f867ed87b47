"""`ssmc compile --scheme auto`: bits for each operator by a search, and what it shows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmc.cli import output

if TYPE_CHECKING:
    from ssmc.compiler import Prepared
    from ssmc.core import Graph
    from ssmc.recipe import Recipe
    from ssmc.tuning.search import Found, Limits

AUTO = "auto"
BASE = "w8a8"
"""The scheme whose `quantise` a search gives its overrides to."""


@dataclass(frozen=True)
class Auto:
    """A search: what it keeps to, and the text and windows it scores on."""

    limits: Limits
    text: Path | None
    windows: int

    def lines(self, recipe: Recipe) -> list[str]:
        """What will be done."""
        limits, text = self.limits, self.text or "the calibration text, held out"
        return [
            f"search       {', '.join(limits.candidates)} for each operator, "
            f"at most {limits.evaluations} variants",
            f"scored       on {self.windows} windows of {recipe.length} tokens of {text}",
            f"loss         at most {_percent(limits.max_loss)}",
        ]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self.limits) | {
            "text": None if self.text is None else str(self.text),
            "windows": self.windows,
        }


def read_auto(
    scheme: str, max_loss: str | None, text: Path | None, **given: int | str | None
) -> Auto | None:
    """The search that the options ask for; None where the scheme is not auto.

    `given` are `candidates`, `evaluations` and `windows`. Raises UsageError for options that only
    a search has, and for a bound that is missing or no percentage.
    """
    from ssmc.errors import UsageError
    from ssmc.tuning.search import CANDIDATES, EVALUATIONS, Limits

    if scheme != AUTO:
        if any(v is not None for v in (max_loss, text, *given.values())):
            raise UsageError(
                "--max-loss and the options of a search are for --scheme auto",
                hint="add --scheme auto, or leave them out",
            )
        return None
    listed = str(given["candidates"]).split(",") if given["candidates"] else CANDIDATES
    limits = Limits(
        _bound(max_loss),
        tuple(form.strip() for form in listed),
        int(given["evaluations"] or EVALUATIONS),
    )
    return Auto(limits, text, int(given["windows"] or 8))


def _bound(text: str | None) -> float:
    from ssmc.errors import UsageError

    if text is None:
        raise UsageError("--scheme auto needs a bound", hint="add --max-loss 0.5%")
    number, percent, rest = text.partition("%")
    try:
        value = float(number) / 100
    except ValueError:
        value = math.nan
    if not percent or rest.strip() or not 0 <= value < math.inf:
        raise UsageError(
            f"--max-loss {text} is no percentage",
            hint="write how much perplexity may rise, as in --max-loss 0.5%",
        )
    return value


def choose_bits(
    auto: Auto, prepared: Prepared, recipe: Recipe, windows: Any
) -> tuple[Recipe, Found]:
    """The recipe with the overrides that the search found. SearchError where it found none."""
    from ssmc.errors import SearchError
    from ssmc.tuning.search import search
    from ssmc.tuning.trials import Trials, with_overrides

    trials = Trials(prepared, recipe, windows)
    with output.progress("searching") as report:
        found = search(trials, auto.limits, report)
    if not found.met:
        raise SearchError(
            f"no choice of {', '.join(auto.limits.candidates)} loses at most "
            f"{_percent(auto.limits.max_loss)}: the best of {found.evaluations} variants loses "
            f"{_percent(found.score.loss)} at {output.megabytes(found.score.bytes)}",
            hint="raise --max-loss or --evaluations, or name more --candidates, such as float",
        )
    plan = with_overrides(recipe.plan(), found.overrides)
    passes = [{p.name: p.options()} for p in plan]
    return recipe.model_copy(update={"passes": passes}), found


def to_json(found: Found) -> dict[str, Any]:
    """What a search found as plain data, losses as fractions."""
    scores = {
        k: asdict(s) | {"loss": s.loss} for k, s in (("start", found.start), ("found", found.score))
    }
    return scores | {
        "evaluations": found.evaluations,
        "overrides": list(found.overrides),
        "formats": found.formats,
        "alone": found.alone,
    }


def say(auto: Auto, found: Found, graph: Graph) -> None:
    """The start, what was found, and the format of each operator, a row a layer."""
    start, score = found.start, found.score
    output.say(
        f"\nsearch       {found.evaluations} variants; {auto.limits.candidates[0]} loses "
        f"{_percent(start.loss)} at {output.megabytes(start.bytes)}"
    )
    output.say(
        f"found        loses {_percent(score.loss)} of at most {_percent(auto.limits.max_loss)} "
        f"at {output.megabytes(score.bytes)} (divergence {1e3 * score.kl:.3f} mnat, "
        f"perplexity {100 * score.perplexity:+.2f} %)\n"
    )
    output.say_table(*_table(found.formats, graph))
    output.say("")


def _table(formats: dict[str, str], graph: Graph) -> tuple[list[str], list[list[str]]]:
    from ssmc.passes._formats import operators

    cells: dict[str, dict[str, str]] = {}
    for operator in operators(graph):
        row = cells.setdefault(operator.layer or "", {})
        known = row.get(operator.role)
        form = formats[operator.address]
        row[operator.role] = form if known in (None, form) else f"{known} {form}"
    roles = list(dict.fromkeys(role for row in cells.values() for role in row))
    rows = [[layer, *(row.get(role, "") for role in roles)] for layer, row in cells.items()]
    return ["", *roles], rows


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"
