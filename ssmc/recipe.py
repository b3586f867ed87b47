"""A recipe: everything that decides what a compilation makes, as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from ssmc.catalogue import builtin_recipes
from ssmc.core.options import parse_passes
from ssmc.core.passes import Pass
from ssmc.core.plan import make_plan
from ssmc.errors import UsageError, choices, did_you_mean
from ssmc.lowering import BACKENDS

SCHEMES: dict[str, str | None] = {
    "w8a8": "quantise",
    "w4a8": "quantise{weights=4,group=128,range=mse}",
    "w8a16": "quantise{activations=16,scope=all}",
    "w4a16": "quantise{weights=4,group=128,range=mse,activations=16}",
    "w3a16": "quantise{weights=3,group=128,range=mse,activations=16}",
    "w2a16": "quantise{weights=2,group=128,range=mse,activations=16}",
    "none": None,
}


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
    seed: int = Field(default=0, ge=0, lt=2**63)
    backend: str = "auto"

    @field_validator("backend")
    @classmethod
    def _known_backend(cls, name: str) -> str:
        if name not in ("auto", *BACKENDS):
            raise PydanticCustomError("unknown_backend", "unknown backend '{name}'", {"name": name})
        return name

    def plan(self) -> list[Pass]:
        """Every pass that will run, in order. UsageError for anything that cannot be planned."""
        passes = parse_passes(self.passes)
        if self.scheme not in SCHEMES:
            raise UsageError(
                f"unknown scheme '{self.scheme}'",
                hint=choices(self.scheme, SCHEMES),
            )
        added = SCHEMES[self.scheme]
        stages = [p.stage for p in passes]
        if added and not any(p.stage == "quantise" and not p.beside_scheme for p in passes):
            at = stages.index("quantise") if "quantise" in stages else len(stages)
            passes[at:at] = parse_passes(added)
        return make_plan(passes)


def find_recipe(name: str | Path, **overrides: Any) -> Recipe:
    """The recipe of a file, or where there is no such file the one that comes with ssmc.

    `overrides` as for `read_recipe`. UsageError where there is neither.
    """
    path, known = Path(name), builtin_recipes()
    if path.is_file() or str(name) not in known:
        return read_recipe(path, **overrides)
    return read_recipe(known[str(name)], **overrides)


def recipe_title(path: Path) -> str:
    """What a recipe file says of itself: its first line, which is a comment."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def read_recipe(path: Path, **overrides: Any) -> Recipe:
    """The recipe of a YAML or JSON file, with `overrides` that are not None put over it.

    An artefact's `ssmc.json` is read too: its recipe is the one it was made with.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UsageError(
            f"cannot read recipe {path}: {error.strerror}",
            hint=did_you_mean(str(path), builtin_recipes())
            or "give a YAML file, the ssmc.json of an artefact, or a name from `ssmc recipes`",
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if isinstance(data, dict) and "recipe" in data:
        data = data["recipe"]
    if not isinstance(data, dict):
        raise UsageError(f"recipe {path} is not a mapping", hint="write `passes: [...]`")
    given = {k: v for k, v in overrides.items() if v is not None}
    return _validated({str(key): value for key, value in data.items()} | given, str(path))


def make_recipe(*, where: str = "recipe", **data: Any) -> Recipe:
    """A checked recipe; UsageError names the first field that is wrong."""
    return _validated(data, where)


def _validated(data: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key, problem = str(first["loc"][0]), first["msg"]
        hint = None
        if first["type"] == "extra_forbidden":
            problem = "unknown field"
            hint = choices(key, Recipe.model_fields)
        elif first["type"] == "unknown_backend":
            hint = choices(data[key], ("auto", *BACKENDS))
        elif key == "passes":
            problem = "neither text nor a list of names and of {name: {option: value}}"
        raise UsageError(f"{where}: {key}: {problem}", hint=hint) from None
