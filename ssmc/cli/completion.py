"""What the shell completes in the place of an option's value or an argument.

The shell waits for it at each Tab, so nothing here imports torch: closed lists stand here as words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ssmc.catalogue import builtin_passes, builtin_recipes, plugin_passes

Complete = Callable[[str], list[str]]

HOLDS_A_MODEL = ("config.json", "ssmc.json")
"""A folder with one of these is a model or an artefact."""

HOLDS_A_PROGRAM = ("code.safetensors",)


def words(*known: str) -> Complete:
    """What completes one of a closed list."""
    return lambda incomplete: _beginning(incomplete, known)


def one_pass(incomplete: str) -> list[str]:
    """The name of a pass, of those of installed packages as well."""
    return _beginning(incomplete, _passes())


def pass_list(incomplete: str) -> list[str]:
    """The last name of a list of passes; within the braces of options there is nothing."""
    before, comma, last = incomplete.rpartition(",")
    if incomplete.count("{") > incomplete.count("}"):
        return []
    return [f"{before}{comma}{name}" for name in _beginning(last, _passes())]


def recipe(incomplete: str) -> list[str]:
    """The name of a recipe, or a recipe's file."""
    files = (path for path in _entries(incomplete) if path.endswith((".yaml", ".yml", "ssmc.json")))
    return [*_beginning(incomplete, builtin_recipes()), *files]


def one_recipe(incomplete: str) -> list[str]:
    """The name of a recipe."""
    return _beginning(incomplete, builtin_recipes())


def target(incomplete: str) -> list[str]:
    """`demo`, and folders; those without a model in them with a slash, to go on from."""
    return [*_beginning(incomplete, ["demo"]), *_folders(incomplete)]


def artefact(incomplete: str) -> list[str]:
    """A folder, as `target` has it."""
    return list(_folders(incomplete))


def native(incomplete: str) -> list[str]:
    """A folder; one with a native program without a slash."""
    return list(_folders(incomplete, HOLDS_A_PROGRAM))


def target_or(*known: str) -> Complete:
    """One of a closed list, or what `target` completes."""
    return lambda incomplete: [*_beginning(incomplete, known), *target(incomplete)]


def _beginning(incomplete: str, known: Iterable[str]) -> list[str]:
    return [name for name in known if name.startswith(incomplete)]


def _passes() -> list[str]:
    return sorted({*builtin_passes(), *plugin_passes()})


def _folders(incomplete: str, marks: Iterable[str] = HOLDS_A_MODEL) -> Iterator[str]:
    for name in _entries(incomplete):
        folder = Path(name)
        if any((folder / file).is_file() for file in marks):
            yield name
        elif folder.is_dir():
            yield f"{name}/"


def _entries(incomplete: str) -> list[str]:
    """The paths that begin as what was typed; hidden ones only where it begins with a dot."""
    before, slash, last = incomplete.rpartition("/")
    try:
        names = sorted(path.name for path in Path(before + slash or ".").iterdir())
    except OSError:
        return []
    shown = (n for n in names if not n.startswith(".") or last.startswith("."))
    return [f"{before}{slash}{n}" for n in shown if n.startswith(last)]


BACKENDS = words("auto", "reference", "cpu", "triton")
DEVICES = words("auto", "cpu", "cuda")
SCHEMES = words("w8a8", "w4a8", "w8a16", "w4a16", "w3a16", "w2a16", "auto", "none")
STAGES = words("analyse", "rewrite", "reconstruct", "calibrate", "quantise")
FORMATS = words("hf", "compressed-tensors", "pt2", "aoti", "native", "gguf")
GGUF_TYPES = words("q8_0", "f16", "f32")
SIZES = words(
    "130m", "370m", "790m", "1.4b", "2.8b",
    "mamba2-130m", "mamba2-370m", "mamba2-780m", "mamba2-1.3b", "mamba2-2.7b",
)  # fmt: skip
