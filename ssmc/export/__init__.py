"""What others run: a compiled model in the formats of other programs, one file a format."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmc.errors import UsageError, choices


@dataclass(frozen=True)
class Format:
    """A format: what reads it, and the module whose `export(artefact, out, force=)` writes it."""

    reader: str
    module: str


FORMATS = {
    "hf": Format("transformers, once ssmc is installed", "ssmc.export.huggingface"),
}


def export(artefact: str | Path, out: str | Path, form: str = "hf", *, force: bool = False) -> Path:
    """Write the artefact in a folder to `out` in a format of FORMATS, whole or not at all.

    Raises UsageError for an unknown format, for `out` where it is taken (`force` replaces an
    earlier export) and for what the format cannot express.
    """
    from ssmc.runtime import read_artefact

    if form not in FORMATS:
        raise UsageError(f"there is no format '{form}'", hint=choices(form, FORMATS))
    found: Any = importlib.import_module(FORMATS[form].module)
    return Path(found.export(read_artefact(artefact), out, force=force))
