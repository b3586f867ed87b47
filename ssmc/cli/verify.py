"""`ssmc verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmc.cli import completion, output

if TYPE_CHECKING:
    from ssmc.runtime.verify import Comparison


def run(
    artefact: Annotated[
        Path, typer.Argument(help="Folder of an artefact.", autocompletion=completion.artefact)
    ],
    device: Annotated[
        str,
        typer.Option(help="auto, cpu or cuda: where it runs.", autocompletion=completion.DEVICES),
    ] = "auto",
    backend: Annotated[
        str,
        typer.Option(help="auto, reference, cpu or triton.", autocompletion=completion.BACKENDS),
    ] = "auto",
    length: Annotated[int, typer.Option(min=1, help="Tokens of the text compared on.")] = 128,
    text: Annotated[Path | None, typer.Option(help="Text (default: the embedded).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Compare the lowered artefact with its simulation, operator by operator.

    Integers must be equal bit for bit, as far as a kernel states no tolerance. Ends with exit code
    1 where an operator differs.
    """
    from ssmc.cli.target import open_target
    from ssmc.demo import evaluation_file
    from ssmc.errors import UsageError, VerifyError
    from ssmc.runtime import is_artefact
    from ssmc.runtime.verify import verify

    if not is_artefact(artefact):
        raise UsageError(
            f"{artefact} is no artefact", hint="give the folder that ssmc compile wrote"
        )
    opened = open_target(str(artefact), backend, device)
    assert opened.compiled is not None
    windows = opened.windows(text or evaluation_file(), max(length, 2), 2)[:, :length]
    found = verify(opened.compiled, windows)
    different = [c for c in found if not c.agrees]
    if as_json:
        output.say_json({"agrees": not different, "comparisons": [asdict(c) for c in found]})
    else:
        output.say_table(
            ["operator", ">calls", ">values", ">differing", ">worst error"], _rows(found)
        )
        agree = f"{len(found) - len(different)} of {len(found)} calls agree"
        output.say(f"\n{agree}, {opened.compiled.backend} against the simulation")
    if different:
        first = different[0]
        raise VerifyError(
            f"{first.node} ({first.operator}) differs: {first.differing} of {first.values} "
            f"integers by up to {first.largest}, relative error {first.error:.1e} "
            f"(tolerance {first.tolerance:.0e})",
            hint=f"{len(different)} of {len(found)} calls differ; this one is the first",
        )


def _rows(found: list[Comparison]) -> list[tuple[Any, ...]]:
    operators = dict.fromkeys(c.operator for c in found)
    groups = {name: [c for c in found if c.operator == name] for name in operators}
    return [
        (
            name,
            len(cs),
            sum(c.values for c in cs),
            sum(c.differing for c in cs),
            f"{max(c.error for c in cs):.1e}",
        )
        for name, cs in groups.items()
    ]
