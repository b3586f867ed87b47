"""`ssmc export`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from ssmc.cli import completion, output


def run(
    artefact: Annotated[
        Path, typer.Argument(help="Folder of an artefact.", autocompletion=completion.artefact)
    ],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="hf, compressed-tensors, pt2, aoti, native or gguf.",
            autocompletion=completion.FORMATS,
        ),
    ] = "hf",
    weights: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="Of the weights in gguf: q8_0, f16 or f32.",
            autocompletion=completion.GGUF_TYPES,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Where to write (ARTEFACT-FORMAT, ARTEFACT-TYPE.gguf)."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Write an artefact in the format of another program."""
    from ssmc.errors import UsageError
    from ssmc.export import FORMATS, export
    from ssmc.runtime import is_artefact

    if not is_artefact(artefact):
        raise UsageError(
            f"{artefact} is no artefact", hint="give the folder that ssmc compile wrote"
        )
    done = export(artefact, out, form, type=weights, force=force)
    files = {path.name: path.stat().st_size for path in done.files()}
    if as_json:
        about = {"format": form, "output": str(done.out), "files": files}
        output.say_json(about | {"kept": done.kept, "notes": done.notes})
        return
    output.say_table(["file", ">bytes"], [(name, f"{size:,}") for name, size in files.items()])
    output.say("")
    for reason, count in Counter(done.kept.values()).most_common():
        output.say(f"{'in 16 bits':12} {count} tensors: {reason}")
    for note in done.notes:
        output.say(f"{'note':12} {note}")
    output.say(f"{'wrote':12} {done.out}\n{'for':12} {FORMATS[form].reader}")
