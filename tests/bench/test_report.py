"""What was measured as data, as tables and as plots, with made-up times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmc.bench.measure import Measurement, Plan, Result, Workload
from ssmc.bench.plot import figure, plot
from ssmc.bench.report import COLUMNS, Report
from ssmc.bench.subjects import Runner
from ssmc.bench.timing import Timing
from ssmc.errors import UsageError


@dataclass
class Named:
    """A subject that is never run."""

    name: str
    weight_bytes: int
    vocabulary: int = 11

    def open(self, batch: int) -> Runner:
        raise AssertionError("its times are made up")


FAST, MIDDLE, SLOW = Named("fast", 5_000_000), Named("middle", 6_000_000), Named("slow", 12_000_000)
FACTOR = {"fast": 1.0, "middle": 2.0, "slow": 4.0}


def took(target: str, workload: Workload) -> Measurement:
    """A token of a sequence takes 1 ms, 2 ms or 4 ms; what is slowest a tenth more."""
    tokens = 1 if workload.kind == "tpot" else workload.prompt + workload.tokens - 1
    ms = FACTOR[target] * workload.batch * tokens
    return Measurement(target, workload, Timing(ms, 0.9 * ms, 1.1 * ms, 3), 0.0, None)


def report(
    plan: Plan, subjects: Sequence[Named], baseline: Named | None = None, **changes: Any
) -> Report:
    every = [w for batch in plan.batches for w in plan.workloads(batch)]
    found = Result([took(s.name, w) for w in every for s in subjects], **changes)
    return Report(subjects, plan, found, torch.device("cpu"), 7, baseline)


PLAN = Plan(ttft=(4, 8), tpot=True, ttlt=((4, 2),), batches=(1, 2), n=3)


def test_as_data() -> None:
    wrong = [("fast", Workload("ttft", 2, 5), 0.5)]
    data = report(PLAN, [FAST, SLOW], SLOW, wrong=wrong).to_json()
    assert (data["target"], data["size"]) == ("fast", 5_000_000)
    assert (data["baseline"], data["baseline_size"]) == ("slow", 12_000_000)
    assert data["sizes"] == {"fast": 5_000_000, "slow": 12_000_000}
    assert data["versions"]["torch"] == torch.__version__
    assert [m["speedup"] for m in data["measurements"][:2]] == [4.0, None]
    assert data["measurements"][-1]["tokens"] == 2
    assert data["wrong"] == [
        {"target": "fast", "kind": "ttft", "batch": 2, "prompt": 5, "error": "0.5"}
    ]


def test_without_a_baseline_the_first_is_what_others_are_compared_with() -> None:
    data = report(PLAN, [SLOW, MIDDLE, FAST]).to_json()
    assert (data["baseline"], data["baseline_size"]) == (None, None)
    assert [m["speedup"] for m in data["measurements"][:3]] == [None, 2.0, 4.0]
    assert {m["speedup"] for m in report(PLAN, [FAST]).to_json()["measurements"]} == {None}


def test_as_rows() -> None:
    rows = report(PLAN, [FAST, SLOW], SLOW).rows()
    assert len(rows) == 16
    assert {len(row) for row in rows} == {len(COLUMNS)}
    assert rows[0][:5] == ("fast", "ttft", "1", "4", "4.000")
    assert rows[-1][:5] == ("slow", "ttlt", "2", "4+2", "40.000")


def test_side_by_side() -> None:
    columns, rows = report(PLAN, [FAST, MIDDLE, SLOW], SLOW).comparison()
    assert columns == ["median ms", ">fast", ">middle", ">slow"]
    assert rows[0] == ["ttft 4, batch 1", "4.000 (4.00x)", "8.000 (2.00x)", "16.000"]
    assert rows[3][0] == "ttlt 4+2, batch 1"
    assert rows[-1] == ["weights", "5.00 MB", "6.00 MB", "12.00 MB"]
    assert len(rows) == 9


def test_what_was_not_timed_stays_empty() -> None:
    made = report(PLAN, [FAST, MIDDLE, SLOW], SLOW)
    made.result.measurements[:] = [m for m in made.result.measurements if m.target != "slow"]
    assert made.comparison()[1][0] == ["ttft 4, batch 1", "4.000", "8.000", ""]


def panels(made: Report) -> list[tuple[str, str, dict[str, tuple[list[float], list[float]]]]]:
    """Title, what is across, and the points of each line of the panels."""
    return [
        (axis.get_title(), axis.get_xlabel(),
         {line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
          for line in axis.get_lines()})
        for axis in figure(made).axes
    ]  # fmt: skip


def test_latency_against_length_and_batch() -> None:
    plan = Plan(ttft=(8, 4), tpot=True, ttlt=((4, 2),), batches=(2, 1))
    first, across, token, last = panels(report(plan, [FAST, SLOW]))
    assert first[:2] == ("time to the first token", "tokens")
    assert first[2]["fast, batch 1"] == ([4, 8], [4, 8])
    assert first[2]["slow, batch 2"] == ([4, 8], [32, 64])
    assert across[:2] == ("time to the first token", "sequences")
    assert across[2]["slow, 4 tokens"] == ([1, 2], [16, 32])
    assert token[:2] == ("time per token", "sequences")
    assert token[2] == {"fast": ([1, 2], [1, 2]), "slow": ([1, 2], [4, 8])}
    assert last[:2] == ("time to the last token", "sequences")


def test_one_workload_is_bars() -> None:
    (axis,) = figure(report(Plan(ttft=(4,), tpot=False), [FAST, SLOW])).axes
    assert axis.get_xlabel() == "4 tokens, batch 1"
    assert [bar.get_height() for bar in axis.patches] == [4, 16]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["fast", "slow"]


def test_a_file_is_written(tmp_path: Path) -> None:
    plot(report(PLAN, [FAST, SLOW]), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UsageError, match="cannot write"):
        plot(report(PLAN, [FAST]), tmp_path / "plot.unknown")
