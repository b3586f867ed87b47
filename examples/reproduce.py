r"""Published methods and this compiler's own, in a table: perplexity, loss, size, last words.

    python examples/reproduce.py
    python examples/reproduce.py --only --also quamba --also 'smooth{alpha=0.8},hadamard,percentile'
    python examples/reproduce.py --models MODEL --models OTHER --calibration TRAIN.jsonl \
        --text TEST.jsonl --last-word PASSAGES.jsonl

Each model is loaded and traced once; each row compiles a copy of its graph and scores the lowered
model on the same windows.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from ssmc.compiler import Hooks, Source, compile_source, read_source
from ssmc.corpus import read_texts, token_windows
from ssmc.demo import evaluation_file
from ssmc.errors import SsmcError, UsageError
from ssmc.evaluate import last_word, perplexity
from ssmc.recipe import Recipe, builtin_recipes, find_recipe, make_recipe
from ssmc.runtime import CompiledModel

FEW = "group=128,range=mse"
ROWS = {
    "naive static W8A8": "naive",
    "dynamic W8A8": "dynamic",
    "SmoothQuant W8A8": "smoothquant",
    "QuaRot W8A8": "quarot",
    "Quamba W8A8": "quamba",
    "Quamba2 W8A8": "quamba2-w8a8",
    "Quamba2 W4A8": "quamba2-w4a8",
    "Quamba2 W4A16": "quamba2-w4a16",
    "default W8A8": "default",
    "default, embedding and head float": "hadamard,percentile,quantise{embedding=false,head=false}",
    "weights 8 bits": "absmax,quantise{activations=16,scope=all}",
    "weights 4 bits": f"absmax,quantise{{weights=4,{FEW},activations=16}}",
    "weights 3 bits": f"absmax,quantise{{weights=3,{FEW},activations=16}}",
    "weights 2 bits": f"absmax,quantise{{weights=2,{FEW},activations=16}}",
    "GPTQ 4 bits": f"hadamard,absmax,quantise{{weights=4,{FEW},activations=16}},gptq",
    "GPTQ 3 bits": f"hadamard,absmax,quantise{{weights=3,{FEW},activations=16}},gptq",
    "GPTQ 4 bits, groups of 32": "gptq-w4a16",
    "W4A8": f"hadamard,percentile,quantise{{weights=4,{FEW}}}",
    "W4A8, GPTQ": f"hadamard,percentile,quantise{{weights=4,{FEW}}},gptq",
    "W4A8, GPTQ, groups of 32": "gptq-w4a8",
}
"""What a row is called, and its recipe or its passes."""


@dataclass(frozen=True)
class Cell:
    """A method on a model; `loss` in percent of the float model's perplexity, `size` in MB.

    `words` is the percentage of last words that are right; None where none were asked for.
    """

    perplexity: float
    loss: float
    size: float
    words: float | None

    def texts(self) -> tuple[str, ...]:
        """The columns as text."""
        words = () if self.words is None else (f"{self.words:.1f}",)
        return f"{self.perplexity:.3f}", f"{self.loss:+.2f}", f"{self.size:.2f}", *words


COLUMNS = ("perplexity", "loss %", "MB", "last word %")


@dataclass(frozen=True)
class Texts:
    """What is scored: a file of text, windows of it, and passages whose last word is predicted."""

    text: Path
    length: int
    windows: int
    passages: list[str]


def main(
    models: Annotated[
        list[str] | None, typer.Option(help="Anything `ssmc compile` takes; may be repeated.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text to score (the embedded).")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Calibration text.")] = None,
    last_word: Annotated[
        Path | None, typer.Option(help="Passages whose last word is to be predicted, .jsonl.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 64,
    length: Annotated[int, typer.Option(min=2, help="Tokens a window, of both texts.")] = 512,
    windows: Annotated[int, typer.Option(min=1, help="Windows scored, at most.")] = 64,
    passages: Annotated[int, typer.Option(min=1, help="Last words predicted, at most.")] = 1000,
    also: Annotated[
        list[str] | None, typer.Option(help="One more row: a recipe or passes; may be repeated.")
    ] = None,
    only: Annotated[bool, typer.Option("--only", help="Those of --also alone.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table.")] = False,
) -> None:
    """Print a table of methods against perplexity, loss, size and last words."""
    wanted = ({} if only else ROWS) | {given: given for given in also or ()}
    shared = {"samples": samples, "length": length}
    shared |= {"calibration": str(calibration)} if calibration else {}
    try:
        recipes = planned(wanted, **shared)
        words = read_texts(last_word)[:passages] if last_word else []
        scored = Texts(text or evaluation_file(), length, windows, words)
        base = make_recipe(**shared)
        table = {
            Path(model).name: measured(read_source(model, base), recipes, scored)
            for model in models or ["demo"]
        }
        show(table, markdown)
    except SsmcError as error:
        print(f"error: {error}", error.hint or "", sep="\n  ", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


def planned(wanted: dict[str, str], **fields: Any) -> dict[str, Recipe]:
    """The recipe of each row; UsageError where one cannot be planned."""
    recipes = {}
    for name, given in wanted.items():
        known = given in builtin_recipes() or Path(given).is_file()
        recipes[name] = (
            find_recipe(given, **fields) if known else make_recipe(passes=given, **fields)
        )
        recipes[name].plan()
    return recipes


def measured(source: Source, recipes: dict[str, Recipe], texts: Texts) -> dict[str, Cell]:
    """The float32 model's cell, then that of each recipe."""
    if source.tokenizer is None:
        raise UsageError("the model has no tokenizer", hint="put tokenizer.json into its folder")
    tokenizer, eos = Tokenizer.from_str(source.tokenizer), source.about["eos"]
    windows = token_windows(tokenizer, read_texts(texts.text), eos, texts.length)[: texts.windows]

    def score(model: Any, size: float, baseline: float | None) -> Cell:
        found = perplexity(model, windows).perplexity
        words = None
        if texts.passages:
            words = 100 * last_word(model, tokenizer, texts.passages, eos).accuracy
        return Cell(found, 100 * (found / (baseline or found) - 1), size / 1e6, words)

    cells = {"float32": score(source.graph, 2 * source.about["source"]["float_bytes"], None)}
    for name, recipe in recipes.items():
        compiled = compile_source(replace(source, graph=source.graph.copy()), recipe, Hooks())
        cells[name] = score(compiled, tensor_bytes(compiled), cells["float32"].perplexity)
        print(f"{source.about['source']['name']}  {name}:", *cells[name].texts(), file=sys.stderr)
    return cells


def tensor_bytes(compiled: CompiledModel) -> int:
    """How many bytes the tensors take in the artefact."""
    with tempfile.TemporaryDirectory() as folder:
        return int(compiled.size(compiled.save(Path(folder) / "out"))["model.safetensors"])


def show(table: dict[str, dict[str, Cell]], markdown: bool) -> None:
    """Print the table, with the columns of each model beside those of the one before."""
    first = next(iter(table.values()))
    heads = ["method"]
    for model, cells in table.items():
        width = len(cells["float32"].texts())
        heads += [f"{model} {column}" for column in COLUMNS[:width]]
    rows = [[name, *(t for cells in table.values() for t in cells[name].texts())] for name in first]
    if markdown:
        lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
        print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    else:
        _show_plain(heads, rows)


def _show_plain(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(heads):
        shown.add_column(name, justify="right" if i else "left", overflow="fold")
    for line in rows:
        shown.add_row(*line)
    console = Console(highlight=False)
    console.width = console.width if console.is_terminal else 100
    console.print(shown, markup=False)


if __name__ == "__main__":
    typer.run(main)
