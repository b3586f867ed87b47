"""Work in processes: what fails, dies or hangs ends alone."""

from __future__ import annotations

import os
import time

from kernel_cases.processes import Failure, run_all


def work(task: str) -> str:
    if task == "fail":
        raise ValueError("no such luck\nat all")
    if task == "die":
        os._exit(3)
    if task == "hang":
        time.sleep(120)
    return task.upper()


def test_run_all() -> None:
    tasks = ["a", "fail", "die", "hang", "b", "c"]
    found = dict(run_all(work, tasks, count=2, seconds=6))
    assert {i: found[i] for i in (0, 4, 5)} == {0: "A", 4: "B", 5: "C"}
    messages = {tasks[i]: str(found[i]) for i in (1, 2, 3)}
    assert all(isinstance(found[i], Failure) for i in (1, 2, 3))
    assert messages["fail"] == "ValueError: no such luck at all"
    assert messages["die"] == "the process died"
    assert messages["hang"] == "no end after 6 s"


def test_one_process_keeps_the_order() -> None:
    assert [i for i, _ in run_all(work, list("abcd"), count=1, seconds=60)] == [0, 1, 2, 3]
