"""`ssmc passes`."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmc.cli import completion, output

if TYPE_CHECKING:
    from ssmc.core import Pass


def run(
    name: Annotated[
        str | None,
        typer.Argument(help="Show this pass in full.", autocompletion=completion.one_pass),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(help="Only passes of this stage.", autocompletion=completion.STAGES),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """List the passes, those of installed packages too, or show one in full."""
    from ssmc.core import find_pass
    from ssmc.core.passes import STAGES

    _check_stage(stage, STAGES)
    rows, broken = ([describe(find_pass(name))], {}) if name else _all()
    rows = sorted(
        (r for r in rows if stage in (None, r["stage"])), key=lambda r: STAGES.index(r["stage"])
    )
    if as_json:
        output.say_json({"passes": rows, "broken": broken})
    elif name:
        _say_one(rows[0])
    else:
        _say_all(rows)
    for message in broken.values():
        output.note(f"warning: {message}")


def _all() -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Every pass as data, and what is wrong with those of other packages that do not load."""
    from ssmc.core import find_pass, known_passes
    from ssmc.errors import UsageError

    rows, broken = [], {}
    for name in known_passes():
        try:
            rows.append(describe(find_pass(name)))
        except UsageError as error:
            broken[name] = str(error)
    return rows, broken


def _check_stage(stage: str | None, stages: tuple[str, ...]) -> None:
    from ssmc.errors import UsageError, choices

    if stage is not None and stage not in stages:
        raise UsageError(
            f"unknown stage '{stage}'",
            hint=choices(stage, stages),
        )


def describe(cls: type[Pass]) -> dict[str, Any]:
    """A pass as data."""
    from ssmc.core.passes import origin

    file, line = inspect.getsourcefile(cls), inspect.getsourcelines(cls)[1]
    return {
        "name": cls.name,
        "stage": cls.stage,
        "needs": list(cls.needs),
        "after": list(cls.after),
        "exact_to": cls.exact_to,
        "options": {
            f.name: {"type": getattr(f.type, "__name__", f.type), "default": f.default}
            for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        },
        "from": origin(cls.name),
        "source": f"{file}:{line}",
        "doc": inspect.getdoc(cls),
    }


def _say_all(rows: list[dict[str, Any]]) -> None:
    table = [
        (r["stage"], r["name"], ", ".join(r["needs"]) or "-", ", ".join(r["after"]) or "-",
         ", ".join(f"{k}={text(v['default'])}" for k, v in r["options"].items()) or "-", r["from"])
        for r in rows
    ]  # fmt: skip
    output.say_table(["stage", "pass", "needs", "after", "options", "from"], table)


def _say_one(row: dict[str, Any]) -> None:
    output.say(f"{row['name']}   stage {row['stage']}, from {row['from']}, {row['source']}\n")
    output.say(f"{row['doc']}\n")
    exact = "not limited" if row["exact_to"] is None else f"{row['exact_to']:.0e}"
    output.say(f"relative error it may add: {exact}")
    output.say(f"needs: {', '.join(row['needs']) or '-'}   after: {', '.join(row['after']) or '-'}")
    for key, option in row["options"].items():
        output.say(f"option {key}: {option['type']} = {text(option['default'])}")


def text(value: Any) -> str:
    """A default as it is typed."""
    return str(value).lower() if value in (True, False, None) else str(value)
