"""`ssmc sensitivity`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmc.cli import completion, output

if TYPE_CHECKING:
    from ssmc.recipe import Recipe
    from ssmc.tuning.sensitivity import Row, Sensitivity
    from ssmc.tuning.trials import Trials


def run(
    model: Annotated[
        str, typer.Argument(help="A model, as in ssmc compile.", autocompletion=completion.target)
    ],
    by: Annotated[
        str,
        typer.Option(
            help="What to take one at a time: block, operator or role.",
            autocompletion=completion.words("block", "operator", "role"),
        ),
    ] = "block",
    leave_out: Annotated[
        bool, typer.Option("--leave-out", help="Quantise everything but one, not only one.")
    ] = False,
    passes: Annotated[
        str | None, typer.Option(help="As in ssmc compile.", autocompletion=completion.pass_list)
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(help="As in ssmc compile (w8a8).", autocompletion=completion.SCHEMES),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe: a name or a file; options here go over it.",
            autocompletion=completion.recipe,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text to score (default: what calibration leaves of its text)."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Windows to score.")] = 4,
    calibration: Annotated[
        Path | None, typer.Option(help="Calibration text, .jsonl or .txt (default: the embedded).")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows (16).")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a window (512).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draw of windows (0).")] = None,
    device: Annotated[
        str,
        typer.Option(help="auto, cpu or cuda: where it runs.", autocompletion=completion.DEVICES),
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Rank the blocks, operators or roles of MODEL by what quantising them costs."""
    from ssmc.cli.target import check_choice
    from ssmc.recipe import find_recipe, make_recipe
    from ssmc.tuning.sensitivity import measure
    from ssmc.tuning.trials import quantise_of

    check_choice("by", by, ("block", "operator", "role"))
    given = {
        "passes": passes,
        "scheme": scheme,
        "calibration": str(calibration) if calibration else None,
        "samples": samples if samples or recipe else 16,
        "length": length,
        "seed": seed,
    }
    given = {key: value for key, value in given.items() if value is not None}
    resolved = find_recipe(recipe, **given) if recipe else make_recipe(**given, where="options")
    quantise_of(resolved.plan())
    trials = open_trials(model, resolved, device, text, limit)
    with output.progress(f"{by}s") as report:
        result = measure(trials, by, leave_out=leave_out, progress=report)  # type: ignore[arg-type]
    about = {"model": model, "by": by, "leave_out": leave_out, "quantise": trials.label(),
             "windows": len(trials.windows), "length": resolved.length}  # fmt: skip
    if as_json:
        return output.say_json(about | {"measure": "kl"} | asdict(result))
    _say(about, result)


def open_trials(model: str, recipe: Recipe, device: str, text: Path | None, limit: int) -> Trials:
    """The model rewritten and calibrated, with progress on stderr, and windows to score it on."""
    from ssmc.compiler import Hooks, prepare, read_source
    from ssmc.device import find_device
    from ssmc.tuning.trials import Trials, held_out_windows

    found = find_device(device)
    output.note(f"loading {model}")
    source = read_source(model, recipe).to(found)
    windows = held_out_windows(source, recipe, text, limit)
    with output.progress("calibrating") as report:
        return Trials(prepare(source, recipe, Hooks(progress=report)), recipe, windows)


def _say(about: dict[str, Any], result: Sensitivity) -> None:
    everything, leave_out = result.everything, about["leave_out"]
    output.say(f"model        {about['model']}")
    output.say(f"scored       {about['windows']} windows of {about['length']} tokens")
    output.say(
        f"quantised    {about['quantise']}: divergence {1e3 * everything.kl:.3f} mnat, "
        f"perplexity {100 * everything.perplexity:+.2f} %, {output.megabytes(everything.bytes)}\n"
    )
    what = "all but one quantised" if leave_out else "one quantised, the rest in float"
    order = "what it saves most, first" if leave_out else "worst first"
    columns = [about["by"], ">operators", ">mnat", ">+-", ">perplexity %", ">MB"]
    columns += [">without it"] if leave_out else [">of all"]
    rows = [_row(row, result, leave_out) for row in result.rows]
    output.say_table(columns, rows, f"{what}, {order}; divergence (KL) in mnat")


def _row(row: Row, result: Sensitivity, leave_out: bool) -> tuple[Any, ...]:
    score, whole = row.score, result.everything.kl
    error = "-" if score.kl_error is None else f"{1e3 * score.kl_error:.3f}"
    share = (score.kl - whole if leave_out else score.kl) / whole if whole else 0.0
    return (
        row.unit,
        row.operators,
        f"{1e3 * score.kl:.3f}",
        error,
        f"{100 * score.perplexity:+.2f}",
        f"{score.bytes / 1e6:.2f}",
        f"{100 * share:+.0f} %" if leave_out else f"{100 * share:.0f} %",
    )
