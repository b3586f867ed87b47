"""`ssmc recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ssmc.cli import completion, output


def run(
    name: Annotated[
        str | None,
        typer.Argument(help="Show this recipe's file.", autocompletion=completion.one_recipe),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """List the recipes that come with ssmc, or show the file of one, to be copied and changed."""
    from ssmc.catalogue import builtin_recipes
    from ssmc.errors import UsageError, choices

    known = builtin_recipes()
    if name is not None and name not in known:
        raise UsageError(f"there is no recipe '{name}'", hint=choices(name, known))
    shown = {name: known[name]} if name is not None else known
    if as_json:
        output.say_json({"recipes": [_described(n, path) for n, path in shown.items()]})
    elif name is not None:
        output.say(known[name].read_text(encoding="utf-8").rstrip())
    else:
        rows = [(d["name"], d["title"]) for d in (_described(*item) for item in shown.items())]
        output.say_table(["recipe", ""], rows)


def _described(name: str, path: Path) -> dict[str, Any]:
    """A recipe as data."""
    from ssmc.recipe import read_recipe, recipe_title

    plan = [{p.name: p.options()} for p in read_recipe(path).plan()]
    return {"name": name, "title": recipe_title(path), "plan": plan, "source": str(path)}
