"""What there is by name, found without importing it: passes and recipes."""

from __future__ import annotations

import pkgutil
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

GROUP = "ssmc.passes"
"""The entry points by which other packages bring passes."""
RECIPES = Path(__file__).parent / "recipes"


def builtin_passes() -> dict[str, str]:
    """The modules of the passes that come with ssmc, by name."""
    import ssmc.passes

    modules = (m.name for m in pkgutil.iter_modules(ssmc.passes.__path__))
    return {m.replace("_", "-"): f"ssmc.passes.{m}" for m in modules if not m.startswith("_")}


def plugin_passes() -> dict[str, EntryPoint]:
    """The entry points of the passes that installed packages bring, by name."""
    return {point.name: point for point in entry_points(group=GROUP)}


def builtin_recipes() -> dict[str, Path]:
    """The files of the recipes that come with ssmc, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
