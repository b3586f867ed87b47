"""`hadamard{block=128},percentile{p=0.99999}`: passes and their options as text and as data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeAlias

from pydantic import TypeAdapter, ValidationError

from ssmc.core.passes import Pass, find_pass
from ssmc.errors import UsageError, did_you_mean

PassSpec: TypeAlias = "str | Pass | dict[str, dict[str, Any] | None]"
_NOTHING = ("none", "None", "null")
_ITEM = re.compile(r"\s*([A-Za-z][\w-]*)\s*(?:\{([^{}]*)\})?\s*(,|$)")


def parse_passes(given: str | Sequence[PassSpec]) -> list[Pass]:
    """The passes named, in order, with their options checked.

    Takes the command line's text, or a sequence of texts, passes, and `{name: options}` as a
    recipe file has them. Raises UsageError for an unknown pass, an unknown or ill-typed option.
    """
    if isinstance(given, str):
        return [build_pass(name, options) for name, options in _split(given)]
    return [p for item in given for p in _one(item)]


def _one(item: PassSpec) -> list[Pass]:
    if isinstance(item, Pass):
        return [item]
    if isinstance(item, str):
        return parse_passes(item)
    if isinstance(item, dict):
        return [build_pass(name, dict(options or {})) for name, options in item.items()]
    raise UsageError(f"a pass is a name or a mapping of a name to options, not {item!r}")


def _split(text: str) -> list[tuple[str, dict[str, str]]]:
    found, at = [], 0
    while at < len(text):
        item = _ITEM.match(text, at)
        if item is None:
            raise UsageError(
                f"cannot read the passes at '{text[at : at + 30]}'",
                hint="write them as name,name{option=value,option=value}",
            )
        found.append((item[1], _options(item[1], item[2])))
        at = item.end()
    return found


def _options(name: str, inside: str | None) -> dict[str, str]:
    pairs = [part.partition("=") for part in (inside or "").split(",") if part.strip()]
    for key, equals, _ in pairs:
        if not equals:
            raise UsageError(
                f"{name}: option '{key.strip()}' has no value", hint=f"write {key.strip()}=VALUE"
            )
    found: dict[str, str] = {}
    for key, _, value in pairs:
        if key.strip() in found:
            raise UsageError(f"{name}: option '{key.strip()}' is given twice", hint="give it once")
        found[key.strip()] = value.strip()
    return found


def build_pass(name: str, options: dict[str, Any]) -> Pass:
    """The pass called `name` with these options (texts are converted to the field's type)."""
    cls = find_pass(name)
    fields = list(cls.__dataclass_fields__)  # type: ignore[attr-defined]
    for key in options:
        if key not in fields:
            raise UsageError(
                f"pass '{name}' has no option '{key}'",
                hint=did_you_mean(key, fields) or f"its options: {', '.join(fields) or 'none'}",
            )
    return _validated(cls, options)


def _validated(cls: type[Pass], options: dict[str, Any]) -> Pass:
    values = {k: None if v in _NOTHING else v for k, v in options.items()}
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"pass '{cls.name}', option '{key}': {first['msg']} (got {options.get(key)!r})"
        ) from None
