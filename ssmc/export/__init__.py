"""What others run: a compiled model in the formats of other programs, one file a format."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssmc.errors import UsageError, choices


@dataclass(frozen=True)
class Format:
    """A format: what reads it, and the module whose `export(artefact, out, force=)` writes it.

    A format with `types` of weights, the usual one first, is one file and no folder, and `export`
    takes the type as well.
    """

    reader: str
    module: str
    types: tuple[str, ...] = ()


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
    "native": Format("ssmc run and ssmc.native, without torch", "ssmc.export.native"),
    "gguf": Format("llama.cpp", "ssmc.export.gguf", ("q8_0", "f16", "f32")),
}


@dataclass(frozen=True)
class Exported:
    """What was written, and by tensor what the format could not take as it is, and why.

    `notes` say what else is otherwise where the format is read.
    """

    out: Path
    kept: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def files(self) -> list[Path]:
        """The files of the format, sorted by name."""
        return sorted(self.out.iterdir()) if self.out.is_dir() else [self.out]


def export(
    artefact: str | Path,
    out: str | Path | None = None,
    form: str = "hf",
    *,
    type: str | None = None,
    force: bool = False,
) -> Exported:
    """Write the artefact in a folder to `out` in a format of FORMATS, whole or not at all.

    `out` is by default the artefact's folder with the format behind its name. Raises UsageError for
    an unknown format or type, for `out` where it is taken (`force` replaces an earlier export) and
    for what the format cannot express; UnsupportedError for a model that it cannot.
    """
    from ssmc.runtime import read_artefact

    chosen = _chosen(form, type)
    if out is None:
        beside = Path(artefact).with_name(Path(artefact).resolve().name)
        out = f"{beside}-{chosen['type']}.{form}" if chosen else f"{beside}-{form}"
    module: Any = importlib.import_module(FORMATS[form].module)
    found: Exported = module.export(read_artefact(artefact), Path(out), force=force, **chosen)
    return found


def _chosen(form: str, type: str | None) -> dict[str, str]:
    """The type of weights, as an argument, of a format that has types."""
    if form not in FORMATS:
        raise UsageError(f"there is no format '{form}'", hint=choices(form, FORMATS))
    types = FORMATS[form].types
    if type is not None and type not in types:
        hint = choices(type, types) if types else "leave --type out"
        raise UsageError(f"the format {form} has no type '{type}'", hint=hint)
    return {"type": type or types[0]} if types else {}
