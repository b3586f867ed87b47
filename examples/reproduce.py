r"""Published methods and this compiler's own, in two tables.

What quantises weights and activations: perplexity, loss, size, last words. What rounds the states
of scans: perplexity token by token, loss, bytes of the states.

    python examples/reproduce.py
    python examples/reproduce.py --only --also quamba --also 'smooth{alpha=0.8},hadamard,percentile'
    python examples/reproduce.py --only --also-states 'state{bits=4,scales=group}'
    python examples/reproduce.py --models MODEL --models OTHER --calibration TRAIN.jsonl \
        --text TEST.jsonl --last-word PASSAGES.jsonl --markdown

Each model is loaded and traced once; each row compiles a copy of its graph and scores the lowered
model on the same windows. A model that the compiler does not support is left out, and where a row
cannot be done to a model it has no figures; stderr says why.
"""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from ssmc.catalogue import builtin_recipes
from ssmc.compiler import Hooks, Source, compile_source, read_source
from ssmc.corpus import read_texts, token_windows
from ssmc.demo import evaluation_file
from ssmc.errors import SsmcError, UnsupportedError, UsageError
from ssmc.evaluate import last_word, perplexity
from ssmc.overlap import from_text, run_hashes, shared
from ssmc.recipe import Recipe, find_recipe, make_recipe
from ssmc.runtime import CompiledModel

FEW = "group=128,range=mse"
FINE = "weights=4,group=32,range=mse"
GPTAQ = "gptq{asymmetric=true,sweeps=3,damping=0.05}"
ROWS = {
    "naive static W8A8": "naive",
    "dynamic W8A8": "dynamic",
    "SmoothQuant W8A8": "smoothquant",
    "QuaRot W8A8": "quarot",
    "Quamba W8A8": "quamba",
    "Quamba2 W8A8": "quamba2-w8a8",
    "default W8A8": "default",
    "default, embedding and head float": "hadamard,percentile,quantise{embedding=false,head=false}",
    "W4A16, GPTAQ, groups of 16": "gptaq-w4a16",
    "W4A16, GPTAQ, groups of 32": f"hadamard,absmax,quantise{{{FINE},activations=16}},{GPTAQ}",
    "W4A16, GPTQ, groups of 32": "gptq-w4a16",
    "W4A16, GPTQ": f"hadamard,absmax,quantise{{weights=4,{FEW},activations=16}},gptq",
    "W4A16": f"absmax,quantise{{weights=4,{FEW},activations=16}}",
    "Quamba2 W4A16": "quamba2-w4a16",
    "W4A8, GPTAQ, groups of 32": "gptaq-w4a8",
    "W4A8, GPTQ, groups of 32": "gptq-w4a8",
    "W4A8, GPTQ": f"hadamard,percentile,quantise{{weights=4,{FEW}}},gptq",
    "W4A8": f"hadamard,percentile,quantise{{weights=4,{FEW}}}",
    "Quamba2 W4A8": "quamba2-w4a8",
    "W8A16": "absmax,quantise{activations=16,scope=all}",
    "W3A16": f"absmax,quantise{{weights=3,{FEW},activations=16}}",
    "W3A16, GPTQ": f"hadamard,absmax,quantise{{weights=3,{FEW},activations=16}},gptq",
    "W2A16": f"absmax,quantise{{weights=2,{FEW},activations=16}}",
}
"""What a row is called, and its recipe or its passes."""

NOISY = "rounding=stochastic"
STATES = {
    "16 bits": "state",
    "8 bits, one scale": "state{bits=8,scales=tensor}",
    "8 bits, DSQ": "state{bits=8}",
    "8 bits, DSQ, and W8A8": "hadamard,percentile,quantise,state{bits=8}",
    "8 bits, groups of 32": "state{bits=8,scales=group}",
    "6 bits, DSQ": "state{bits=6}",
    "6 bits, groups of 32": "state{bits=6,scales=group}",
    "4 bits, one scale": "state{bits=4,scales=tensor}",
    "4 bits, DSQ": "state{bits=4}",
    "4 bits, DSQ and ESR": "reconstruct,state{bits=4}",
    "4 bits, DSQ by largest, stochastic": f"state{{bits=4,scales=decoupled-max,{NOISY}}}",
    "4 bits, groups of 32, stochastic": f"state{{bits=4,scales=group,{NOISY}}}",
    "4 bits, groups of 16, stochastic": f"state{{bits=4,scales=group,group=16,{NOISY}}}",
    "4 bits and error feedback, DSQ": "state{bits=4,feedback=true}",
}
"""What a row of states is called, and its passes: nothing else is quantised that they do not name.

DSQ are decoupled scales and ESR the reconstruction of what selects, both of Q-Mamba.
"""


@dataclass(frozen=True)
class Cell:
    """A method on a model; `loss` in percent of the float model's perplexity.

    `size` is that of the tensors in MB, of states that of a sequence's in kB. `words` is the
    percentage of last words that are right; None where none were asked for.
    """

    perplexity: float
    loss: float
    size: float
    words: float | None = None

    def texts(self) -> tuple[str, ...]:
        """The columns as text."""
        words = () if self.words is None else (f"{self.words:.1f}",)
        return f"{self.perplexity:.3f}", f"{self.loss:+.2f}", f"{self.size:.2f}", *words


COLUMNS = ("perplexity", "loss %", "MB", "last word %")
STATE_COLUMNS = ("perplexity", "loss %", "kB")
Cells = dict[str, Cell | None]
"""A column of a table: a cell a row, None where a row cannot be done."""


@dataclass(frozen=True)
class Texts:
    """What is scored: windows of a text, and passages whose last word is predicted.

    Token by token the first `recurrent` of the windows are.
    """

    text: Path
    length: int
    windows: int
    recurrent: int
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
    recurrent: Annotated[
        int | None, typer.Option(min=1, help="Of these token by token, at most (all).")
    ] = None,
    passages: Annotated[int, typer.Option(min=1, help="Last words predicted, at most.")] = 1000,
    also: Annotated[
        list[str] | None, typer.Option(help="One more row: a recipe or passes; may be repeated.")
    ] = None,
    also_states: Annotated[
        list[str] | None, typer.Option(help="One more row of states: passes; may be repeated.")
    ] = None,
    only: Annotated[
        bool, typer.Option("--only", help="Those of --also and --also-states alone.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As Markdown tables.")] = False,
) -> None:
    """Print methods against perplexity, loss, size and last words, and states by themselves."""
    shared: dict[str, Any] = {"samples": samples, "length": length}
    shared |= {"calibration": str(calibration)} if calibration else {}
    try:
        recipes, states = (
            planned(({} if only else rows) | {a: a for a in more or ()}, **given)
            for rows, more, given in (
                (ROWS, also, shared), (STATES, also_states, shared | {"scheme": "none"}),
            )
        )  # fmt: skip
        words = read_texts(last_word)[:passages] if last_word else []
        scored = Texts(text or evaluation_file(), length, windows, recurrent or windows, words)
        subjects = [
            Subject.of(source, scored)
            for source in opened(models or ["demo"], make_recipe(**shared))
        ]
        if recipes or not states:
            show(measured(subjects, recipes, prefill), COLUMNS, markdown)
        if states:
            show(measured(subjects, states, token_by_token), STATE_COLUMNS, markdown)
    except SsmcError as error:
        print(f"error: {error}", error.hint or "", sep="\n  ", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    for subject in subjects:
        print(f"{subject.name}: {subject.overlap:.1%} of the text is in the calibration text")
    print(f"{circumstances()}: python {shlex.join(sys.argv)}")


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


def opened(models: Sequence[str], recipe: Recipe) -> Iterator[Source]:
    """The models that are supported, traced; UnsupportedError where none is."""
    refused = []
    for model in models:
        try:
            yield read_source(model, recipe)
        except UnsupportedError as error:
            print(f"{model} is left out: {error}", file=sys.stderr)
            refused.append(error)
    if len(refused) == len(models):
        raise refused[0]


@dataclass(frozen=True)
class Subject:
    """A model, and what it is scored on."""

    source: Source
    windows: torch.Tensor
    texts: Texts
    tokenizer: Tokenizer

    @classmethod
    def of(cls, source: Source, texts: Texts) -> Subject:
        """Cut the text into windows; UsageError where there is no tokenizer."""
        if source.tokenizer is None:
            raise UsageError(
                "the model has no tokenizer", hint="put tokenizer.json into its folder"
            )
        tokenizer = Tokenizer.from_str(source.tokenizer)
        found = token_windows(tokenizer, read_texts(texts.text), source.about["eos"], texts.length)
        return cls(source, found[: texts.windows], texts, tokenizer)

    @property
    def name(self) -> str:
        """What the source is called."""
        return str(self.source.about["source"]["name"])

    @property
    def overlap(self) -> float:
        """The share of what is scored that was calibrated on."""
        known = from_text(self.source.about["calibration"]["runs"])
        return shared(run_hashes(self.windows), known) or 0.0

    def compiled(self, recipe: Recipe) -> CompiledModel:
        """The model by a recipe."""
        copy = replace(self.source, graph=self.source.graph.copy())
        return compile_source(copy, recipe, Hooks())


def prefill(subject: Subject, compiled: CompiledModel | None, baseline: float | None) -> Cell:
    """The cell of a compiled model (None: in float), whose loss is that against a perplexity."""
    model: Any = compiled or subject.source.graph
    found = perplexity(model, subject.windows).perplexity
    words = None
    if subject.texts.passages:
        eos = subject.source.about["eos"]
        words = 100 * last_word(model, subject.tokenizer, subject.texts.passages, eos).accuracy
    size = tensor_bytes(compiled) if compiled else 2 * subject.source.about["source"]["float_bytes"]
    return Cell(found, 100 * (found / (baseline or found) - 1), size / 1e6, words)


def token_by_token(
    subject: Subject, compiled: CompiledModel | None, baseline: float | None
) -> Cell:
    """The same in recurrent mode, with the bytes of the states."""
    if compiled and not any(
        r["matched"] for r in compiled.report["passes"] if r["name"] == "state"
    ):
        raise UsageError("it has no scan whose state is kept")
    model: Any = compiled or subject.source.graph
    windows = subject.windows[: subject.texts.recurrent]
    found = perplexity(model, windows, "recurrent", 64).perplexity
    graph = compiled.graph if compiled else subject.source.graph
    size = sum(spec.zeros(1, "meta").nbytes for spec in graph.states)
    return Cell(found, 100 * (found / (baseline or found) - 1), size / 1e3)


Score = Callable[[Subject, CompiledModel | None, float | None], Cell]


def measured(
    subjects: Sequence[Subject], recipes: dict[str, Recipe], score: Score
) -> dict[str, Cells]:
    """The cells of each model: that in float32, and that of each recipe."""
    exact = {subject.name: score(subject, None, None) for subject in subjects}
    table: dict[str, Cells] = {name: {"float32": cell} for name, cell in exact.items()}
    for name, cell in exact.items():
        print(f"{name}  float32:", *cell.texts(), file=sys.stderr, flush=True)
    for row, recipe in recipes.items():
        for subject in subjects:
            found: Cell | None = None
            try:
                found = score(subject, subject.compiled(recipe), exact[subject.name].perplexity)
            except SsmcError as error:
                print(f"{subject.name}  {row}: {error}", file=sys.stderr, flush=True)
            else:
                print(f"{subject.name}  {row}:", *found.texts(), file=sys.stderr, flush=True)
            table[subject.name][row] = found
    return table


def tensor_bytes(compiled: CompiledModel) -> int:
    """How many bytes the tensors take in the artefact."""
    with tempfile.TemporaryDirectory() as folder:
        return int(compiled.size(compiled.save(Path(folder) / "out"))["model.safetensors"])


def circumstances() -> str:
    """When, with which versions and on what machine."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("ssmc", "torch", "transformers"))
    day = datetime.datetime.now(datetime.UTC).date()
    return f"{day}, {versions}, {platform.machine()}, {torch.get_num_threads()} threads"


def show(table: dict[str, Cells], columns: Sequence[str], markdown: bool) -> None:
    """Print the table, with the columns of each model beside those of the one before."""
    heads, first = ["method"], next(iter(table.values()))
    widths = {model: len(_cell_texts(cells["float32"], 0)) for model, cells in table.items()}
    for model, width in widths.items():
        heads += [f"{model} {column}" for column in columns[:width]]
    rows = [
        [row, *(t for model in table for t in _cell_texts(table[model][row], widths[model]))]
        for row in first
    ]
    if markdown:
        lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
        print("\n".join(f"| {' | '.join(line)} |" for line in lines), end="\n\n")
    else:
        _show_plain(heads, rows)


def _cell_texts(cell: Cell | None, width: int) -> tuple[str, ...]:
    return ("-",) * width if cell is None else cell.texts()


def _show_plain(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(heads):
        shown.add_column(name, justify="right" if i else "left", overflow="fold")
    for line in rows:
        shown.add_row(*line)
    console = Console(highlight=False)
    console.width = console.width if console.is_terminal else 100
    console.print(shown, "", markup=False)


if __name__ == "__main__":
    typer.run(main)
