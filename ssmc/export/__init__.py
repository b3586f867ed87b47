"""What others run: a compiled model in the formats of other programs, one file a format."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
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
    "compressed-tensors": Format(
        "transformers with the package compressed-tensors, and vLLM",
        "ssmc.export.compressed_tensors",
    ),
    "pt2": Format("torch.export.load, once ssmc.ops is imported", "ssmc.export.pt2"),
    "aoti": Format(
        "torch._inductor.aoti_load_package, once ssmc.ops is imported", "ssmc.export.aoti"
    ),
}


@dataclass(frozen=True)
class Exported:
    """What was written, and by tensor what the format could not take as it is, and why."""

    out: Path
    kept: dict[str, str] = field(default_factory=dict)


def export(
    artefact: str | Path, out: str | Path, form: str = "hf", *, force: bool = False
) -> Exported:
    """Write the artefact in a folder to `out` in a format of FORMATS, whole or not at all.

    Raises UsageError for an unknown format, for `out` where it is taken (`force` replaces an
    earlier export) and for what the format cannot express.
    """
    from ssmc.runtime import read_artefact

    if form not in FORMATS:
        raise UsageError(f"there is no format '{form}'", hint=choices(form, FORMATS))
    module: Any = importlib.import_module(FORMATS[form].module)
    found: Exported = module.export(read_artefact(artefact), Path(out), force=force)
    return found
