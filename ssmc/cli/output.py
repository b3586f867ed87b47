"""What the commands print: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ssmc.core.ranks import Ranks

WIDTH = 100  # where the output is no terminal

Report = Callable[[int, int], None]


def console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr; styled on a terminal only, and never with NO_COLOR."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else WIDTH)


def say(text: str) -> None:
    """A line of result, as it is."""
    print(text)


def say_part(text: str) -> None:
    """A part of a line of result, to be seen at once."""
    print(text, end="", flush=True)


def note(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def of_first_rank() -> Iterator[Ranks]:
    """The processes that torchrun started, of which the first is heard; without it, this one."""
    from ssmc.core.ranks import join, leave

    ranks = join()
    with contextlib.ExitStack() as stack:
        if ranks.number:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield ranks
    leave()


def say_json(data: dict[str, Any]) -> None:
    """One object with the schema it follows."""
    print(json.dumps({"schema": 1} | data, indent=1, allow_nan=False))


def say_json_line(data: dict[str, Any]) -> None:
    """One such object on one line."""
    print(json.dumps({"schema": 1} | data, allow_nan=False), flush=True)


def say_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
    """A table; columns whose name begins with > are aligned to the right."""
    if title:
        say(title)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        right = name.startswith(">")
        table.add_column(name.lstrip(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    console().print(table)


def fail(message: str, hint: str | None, code: int) -> NoReturn:
    """End with one message and an exit code."""
    shown = console(stderr=True)
    shown.print("[bold red]error:[/] ", end="")
    shown.print(message, markup=False, soft_wrap=True)
    if hint:
        shown.print(f"  {hint}", markup=False, soft_wrap=True)
    sys.exit(code)


@contextlib.contextmanager
def progress(label: str) -> Iterator[Report]:
    """Report (done, total) as a bar with counts, elapsed and remaining time, or as plain lines."""
    shown = console(stderr=True)
    if not shown.is_terminal:
        yield _Lines(label)
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
        console=shown,
        transient=True,
    ) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """Progress where there is no terminal: a line at each quarter."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.quarter = 0

    def __call__(self, done: int, total: int) -> None:
        quarter = 4 * done // max(total, 1)
        if quarter > self.quarter:
            note(f"{self.label}: {done}/{total}")
        self.quarter = quarter


def megabytes(size: float) -> str:
    """A size in MB (10^6 bytes)."""
    return f"{size / 1e6:.2f} MB"
