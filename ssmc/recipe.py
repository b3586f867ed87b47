"""A recipe: everything that decides what a compilation makes, as data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ssmc.core.options import parse_passes
from ssmc.core.passes import Pass
from ssmc.core.plan import make_plan
from ssmc.errors import UsageError, did_you_mean

SCHEMES: dict[str, str | None] = {"w8a8": "quantise", "none": None}


class Recipe(BaseModel):
    """Passes in order, the scheme that is added where no pass quantises, and the calibration.

    `samples` windows of `length` tokens are drawn from the calibration text with `seed`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    passes: str | list[str | dict[str, dict[str, Any] | None]] = "hadamard,percentile"
    scheme: str = "w8a8"
    calibration: str | None = None
    samples: int = Field(default=64, ge=1)
    length: int = Field(default=512, ge=2)
    seed: int = 0
    backend: Literal["auto", "reference", "cpu"] = "auto"

    def plan(self) -> list[Pass]:
        """Every pass that will run, in order. UsageError for anything that cannot be planned."""
        passes = parse_passes(self.passes)
        if self.scheme not in SCHEMES:
            raise UsageError(
                f"unknown scheme '{self.scheme}'",
                hint=did_you_mean(self.scheme, SCHEMES) or f"there are {', '.join(SCHEMES)}",
            )
        added = SCHEMES[self.scheme]
        if added and not any(p.stage == "quantise" for p in passes):
            passes += parse_passes(added)
        return make_plan(passes)


def read_recipe(path: Path, **overrides: Any) -> Recipe:
    """The recipe of a YAML or JSON file, with `overrides` that are not None put over it.

    An artefact's `ssmc.json` is read too: its recipe is the one it was made with.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UsageError(f"cannot read recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if isinstance(data, dict) and "recipe" in data:
        data = data["recipe"]
    if not isinstance(data, dict):
        raise UsageError(f"recipe {path} is not a mapping", hint="write `passes: [...]`")
    return make_recipe(**data | {k: v for k, v in overrides.items() if v is not None}, where=str(path))


def make_recipe(*, where: str = "recipe", **data: Any) -> Recipe:
    """A checked recipe; UsageError names the first field that is wrong."""
    try:
        return Recipe(**data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        hint = did_you_mean(key, Recipe.model_fields)
        raise UsageError(f"{where}: {key}: {first['msg']}", hint=hint) from None


def recipe_text(recipe: Recipe) -> str:
    """The recipe as canonical JSON."""
    return json.dumps(recipe.model_dump(), sort_keys=True)
