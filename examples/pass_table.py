"""Passes against the perplexity they cost, as one table.

    python examples/pass_table.py
    python examples/pass_table.py --also 'smooth{alpha=0.8},hadamard,percentile'
    python examples/pass_table.py --model MODEL --calibration TRAIN.jsonl --text TEST.jsonl

The model is loaded and traced once; each row compiles a copy of its graph and scores the lowered
model on the same windows.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from ssmc.compiler import Hooks, Source, compile_source, read_source
from ssmc.corpus import read_texts, token_windows
from ssmc.demo import evaluation_file
from ssmc.errors import SsmcError, UsageError
from ssmc.evaluate import perplexity
from ssmc.recipe import Recipe, make_recipe
from ssmc.runtime import CompiledModel

ROWS = (
    "absmax,quantise{granularity=tensor}",
    "smooth,absmax,quantise{granularity=tensor}",
    "hadamard,percentile,quantise{granularity=tensor}",
    "absmax",
    "hadamard,percentile",
    "hadamard,percentile,quantise{embedding=false,head=false}",
    "hadamard{residual=true},percentile",
)
COLUMNS = ("passes", "perplexity", "loss %", "size MB", "of 16 bit")


@dataclass(frozen=True)
class Row:
    """One line of the table; `loss` is in percent of the float model's perplexity, `size` in MB."""

    passes: str
    perplexity: float
    loss: float
    size: float
    ratio: float

    def cells(self) -> tuple[str, ...]:
        """The columns as text."""
        passes, *numbers = astuple(self)
        return passes, *(form.format(n) for form, n in zip(_FORMS, numbers, strict=True))


_FORMS = ("{:.3f}", "{:+.2f}", "{:.2f}", "{:.3f}")


def main(
    model: Annotated[str, typer.Option(help="Anything `ssmc compile` takes.")] = "demo",
    text: Annotated[Path | None, typer.Option(help="Text to score (the embedded).")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Calibration text.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 64,
    length: Annotated[int, typer.Option(min=2, help="Tokens a window, of both texts.")] = 512,
    windows: Annotated[int, typer.Option(min=1, help="Windows scored, at most.")] = 64,
    also: Annotated[list[str] | None, typer.Option(help="One more row: its passes.")] = None,
    only: Annotated[bool, typer.Option("--only", help="Those of --also alone.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table.")] = False,
) -> None:
    """Print a table of passes against perplexity, loss and size."""
    wanted = [*(() if only else ROWS), *(also or ())]
    try:
        recipe = make_recipe(
            calibration=str(calibration) if calibration else None, samples=samples, length=length
        )
        recipes = planned(recipe, wanted)
        source = read_source(model, recipe)
        scored = scored_windows(source, text or evaluation_file(), length, windows)
        show(list(table(source, recipes, scored)), markdown)
    except SsmcError as error:
        print(f"error: {error}", error.hint or "", sep="\n  ", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


def planned(recipe: Recipe, wanted: Sequence[str]) -> dict[str, Recipe]:
    """The recipe with each of the passes wanted; UsageError where one cannot be planned."""
    recipes = {passes: recipe.model_copy(update={"passes": passes}) for passes in wanted}
    for asked in recipes.values():
        asked.plan()
    return recipes


def scored_windows(source: Source, text: Path, length: int, limit: int) -> torch.Tensor:
    """The first `limit` windows [n, length] of a text, in the tokens of the model."""
    if source.tokenizer is None:
        raise UsageError("the model has no tokenizer", hint="put tokenizer.json into its folder")
    tokenizer = Tokenizer.from_str(source.tokenizer)
    return token_windows(tokenizer, read_texts(text), source.about["eos"], length)[:limit]


def table(source: Source, recipes: dict[str, Recipe], windows: torch.Tensor) -> Iterator[Row]:
    """The float32 model's row, then one for each recipe."""
    original = source.about["source"]["float_bytes"]
    baseline = perplexity(source.graph, windows).perplexity
    yield Row("float32", baseline, 0.0, original / 1e6, 1.0)
    for passes, recipe in recipes.items():
        print(f"... {passes}", file=sys.stderr)
        compiled = compile_source(replace(source, graph=source.graph.copy()), recipe, Hooks())
        found, size = perplexity(compiled, windows).perplexity, tensor_bytes(compiled)
        yield Row(passes, found, 100 * (found / baseline - 1), size / 1e6, size / original)


def tensor_bytes(compiled: CompiledModel) -> int:
    """How many bytes the tensors take in the artefact."""
    with tempfile.TemporaryDirectory() as folder:
        return int(compiled.size(compiled.save(Path(folder) / "out"))["model.safetensors"])


def show(rows: Sequence[Row], markdown: bool) -> None:
    """Print the table."""
    cells = [row.cells() for row in rows]
    if markdown:
        lines = [COLUMNS, ("---", *["---:"] * 4), *((f"`{c[0]}`", *c[1:]) for c in cells)]
        print("\n".join(f"| {' | '.join(line)} |" for line in lines))
        return
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(COLUMNS):
        shown.add_column(name, justify="right" if i else "left", overflow="fold")
    for line in cells:
        shown.add_row(*line)
    console = Console(highlight=False)
    console.width = console.width if console.is_terminal else 100
    console.print(shown, markup=False)


if __name__ == "__main__":
    typer.run(main)
