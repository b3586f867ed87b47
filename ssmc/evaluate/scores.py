"""Tasks of lm-eval run on a model, and what two models score compared document by document."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssmc.errors import UsageError, did_you_mean
from ssmc.evaluate import embedded
from ssmc.frontend.weights import first_line

if TYPE_CHECKING:
    from ssmc.evaluate.harness import HarnessModel

Tasks = dict[str, dict[str, Any]]
"""What TaskManager.load gives: `tasks`, `groups` and `group_map`, each by name."""


@dataclass(frozen=True)
class Score:
    """A metric of a task, and what it is for each document, where it is the mean of those."""

    task: str
    metric: str
    value: float
    documents: int
    higher_is_better: bool | None
    each: tuple[float, ...] | None = None

    @property
    def error(self) -> float | None:
        """The standard error of a mean."""
        return None if self.each is None else _standard_error(self.each)

    def difference(self, other: Score) -> tuple[float, float | None]:
        """This less another model's score, and its standard error from document to document.

        That error is smaller than those of both scores: most documents are answered alike.
        """
        error = None
        if self.each is not None and other.each is not None:
            error = _standard_error([a - b for a, b in zip(self.each, other.each, strict=True)])
        return self.value - other.value, error


def find_tasks(names: Iterable[str], include: Sequence[Path] = ()) -> Tasks:
    """The tasks, groups and tags of these names, with their data.

    They are lm-eval's, those over the embedded text, and those of YAML files in the folders
    `include`. Raises UsageError for a name that none has, and where data cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    names = list(dict.fromkeys(names))
    if missing := [folder for folder in include if not folder.is_dir()]:
        raise UsageError(f"there is no folder {missing[0]}", hint="give one with tasks in YAML")
    folders = [embedded.FOLDER, *include]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):  # to read the thousands of lm-eval takes seconds
        manager = TaskManager(include_path=folders)
    for name in names:
        if name not in manager.all_tasks:
            hint = did_you_mean(name, manager.all_tasks) or "`lm_eval ls tasks` lists them"
            raise UsageError(f"lm-eval has no task '{name}'", hint=hint)
    _seed()
    found: Tasks = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        for kind, members in _load(manager, name).items():
            found[kind] |= members
    return found


def _seed() -> None:
    """As lm-eval's own command line does: some tasks draw documents, as they are read or later."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)


def _load(manager: Any, name: str) -> dict[str, Any]:
    try:
        return dict(manager.load([name]))
    except Exception as error:  # of whichever library reads the data, too
        raise UsageError(
            f"the data of task '{name}' cannot be loaded: {first_line(error)}",
            hint="check the connection and HF_HUB_OFFLINE; `--tasks embedded` needs none",
        ) from error


def score(
    model: HarnessModel, tasks: Tasks, limit: int | None = None, fewshot: int | None = None
) -> list[Score]:
    """What a model scores on at most `limit` documents of each task, as lm-eval computes it.

    `fewshot` solved examples stand in front of each question, where the task takes any; None leaves
    their number to the task.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate

    for task in tasks["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=fewshot or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    _seed()
    # Without its bootstrap, which starts processes; the errors of means are computed here.
    found = evaluate(model, tasks, limit=limit, bootstrap_iters=0)
    assert found is not None
    return [s for name in found["results"] for s in _scores(name, found)]


def _scores(name: str, found: Any) -> Iterator[Score]:
    """The metrics of a task or group; those of other filters than `none` named with it."""
    rows = found["results"][name]
    for key, value in rows.items():
        metric, comma, kept = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        better = found["higher_is_better"].get(name, {}).get(metric)
        samples = [s for s in found["samples"].get(name, ()) if s["filter"] == kept]
        label = metric if kept == "none" else f"{metric} ({kept})"
        each = _each([s.get(metric) for s in samples], value)
        yield Score(name, label, float(value), rows["sample_len"], better, each)


def _each(values: list[Any], mean: float) -> tuple[float, ...] | None:
    """The values of the documents, where what is reported is their mean."""
    numbers = [float(v) for v in values if isinstance(v, int | float)]
    if not numbers or len(numbers) < len(values):
        return None
    return tuple(numbers) if math.isclose(statistics.fmean(numbers), mean, rel_tol=1e-6) else None


def _standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
