"""`ssmc eval --tasks`: what a target scores on tasks of lm-eval, beside its float model."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmc.cli import output

if TYPE_CHECKING:
    from ssmc.cli.target import Target
    from ssmc.core.ranks import Ranks
    from ssmc.evaluate.scores import Score, Tasks

NONE = "none"
COLUMNS = ("task", "metric", "better", ">value", ">±")


def find(names: str, include: Sequence[Path]) -> Tasks:
    """The tasks of a list such as piqa,arc_easy; UsageError as find_tasks, and without lm-eval."""
    check_installed()
    from ssmc.evaluate.scores import find_tasks

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of defaults of its own tasks
    return find_tasks([name.strip() for name in names.split(",")], include)


def check_options(tasks: str | None, of_tasks: bool, of_text: bool) -> None:
    """Raise UsageError where options of tasks stand without --tasks, or those of a text beside."""
    from ssmc.errors import UsageError

    if tasks is None and of_tasks:
        raise UsageError(
            "--include, --baseline and --num-fewshot go with --tasks", hint="as in --tasks embedded"
        )
    if tasks is not None and of_text:
        raise UsageError(
            "--tasks have texts of their own",
            hint="leave out --text, --mode, --by-length and --last-word",
        )


def check_installed() -> None:
    """Raise UsageError without lm-eval."""
    from ssmc.errors import UsageError

    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            "tasks need lm-eval, which is not installed", hint="pip install 'ssmc[eval]'"
        )


def score_tasks(
    target: Target,
    baseline: Target | None,
    tasks: Tasks,
    limit: int | None,
    batch: int | None,
    fewshot: int | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """What `ssmc eval --tasks --json` writes."""
    start = time.perf_counter()
    given = (tasks, limit, batch, fewshot, ranks)
    theirs = _score(baseline, *given) if baseline is not None else []
    ours = _score(target, *given)
    others = {(s.task, s.metric): s for s in theirs}
    return {
        "target": target.name,
        "baseline": baseline.name if baseline is not None else None,
        "limit": limit,
        "num_fewshot": fewshot,
        "seconds": time.perf_counter() - start,
        "scores": [_row(s, others.get((s.task, s.metric))) for s in ours],
    }


def _score(
    target: Target,
    tasks: Tasks,
    limit: int | None,
    batch: int | None,
    fewshot: int | None,
    ranks: Ranks | None,
) -> list[Score]:
    from ssmc.evaluate.harness import HarnessModel
    from ssmc.evaluate.scores import score

    tokenizer, eos = target.encoder()
    model = HarnessModel(
        target.run, tokenizer, eos, target.device, batch=batch, ranks=ranks,
        progress=lambda label: output.progress(f"{label} {target.name}"),
    )  # fmt: skip
    return score(model, tasks, limit, fewshot)


def _row(ours: Score, theirs: Score | None) -> dict[str, Any]:
    difference, error = (None, None) if theirs is None else ours.difference(theirs)
    return {
        "task": ours.task,
        "metric": ours.metric,
        "documents": ours.documents,
        "higher_is_better": ours.higher_is_better,
        "value": _finite(ours.value),
        "error": ours.error,
        "baseline": None if theirs is None else _finite(theirs.value),
        "difference": _finite(difference),
        "difference_error": error,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def find_baseline(target: Target, name: str | None, device: str, ranks: Ranks) -> Target | None:
    """The model to compare with: the one named, or what an artefact was made from, if it is here.

    `none` is none. A note says where the second is not to be had, by one of `ranks` at least.
    """
    from ssmc.cli.target import open_model, open_target
    from ssmc.core.saved import Saved
    from ssmc.errors import SsmcError

    if name is not None:
        return open_target(name, device=device) if name != NONE else None
    source = target.compiled.about["source"] if target.compiled is not None else {"kind": "module"}
    if source["kind"] == "module":
        return None
    found = None
    with contextlib.suppress(SsmcError):
        model = open_model(source["name"], device)
        found = model if model.fingerprint == source["fingerprint"] else None
    if all(part.about["found"] for part in ranks.gather(Saved({"found": found is not None}))):
        return found
    output.note(f"{source['name']}, which it was made from, is not here: --baseline MODEL compares")
    return None


def show(found: dict[str, Any]) -> None:
    """A table of what score_tasks gives."""
    other = found["baseline"]
    rows = [_cells(row, other is not None) for row in found["scores"]]
    output.say_table(COLUMNS + ((f">{other}", ">difference", ">±") if other else ()), rows)


def _cells(row: dict[str, Any], compared: bool) -> list[str]:
    better = {True: "higher", False: "lower", None: ""}[row["higher_is_better"]]
    cells = [row["task"], row["metric"], better, _number(row["value"]), _number(row["error"])]
    if compared:
        difference, error = row["difference"], row["difference_error"]
        cells += [_number(row["baseline"]), _number(difference, "+"), _number(error)]
    return cells


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.4f}"
