"""Train a small Mamba-1 language model, like the embedded demo model, from any text.

    python tools/train_demo.py books.txt notes.jsonl -o my-model

writes a Hugging Face folder: weights in bfloat16, configuration, a byte-level BPE tokenizer trained
on the same text, training.json with the loss curve, and a model card.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from training_loop import Settings, new_model, train, validation_loss
from training_output import new_folder, save
from training_text import SMALLEST_VOCABULARY, Corpus, read_corpus
from transformers import MambaForCausalLM

from ssmc.errors import DeviceError, SsmcError, UsageError

log = Console(stderr=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    text: Annotated[list[Path], typer.Argument(help="Training text: .txt, or .jsonl with 'text'.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    validation: Annotated[Path | None, typer.Option(help="Held-out text for perplexity.")] = None,
    d_model: Annotated[int, typer.Option(min=1, help="Width of the residual stream.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Mamba blocks.")] = 8,
    state: Annotated[int, typer.Option(min=1, help="State size of the scan.")] = 16,
    vocabulary: Annotated[
        int, typer.Option(min=SMALLEST_VOCABULARY, help="Tokens in the vocabulary, at most.")
    ] = 8192,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a sequence.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a step.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 2800,
    lr: Annotated[float, typer.Option(min=0.0, help="Peak learning rate.")] = 3e-3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and sampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Train a Mamba-1 language model on TEXT and write it as a Hugging Face folder."""
    transformers.utils.logging.disable_progress_bar()
    settings = Settings(d_model, layers, state, length, batch, steps, lr, seed)
    try:
        target = pick_device(device)
        with new_folder(output) as folder:
            corpus = read_corpus(text, validation, vocabulary, length)
            model, record = fit(corpus, settings, target)
            save(folder, output.name, model, corpus.tokenizer, record)
    except (SsmcError, torch.OutOfMemoryError, OSError, KeyboardInterrupt) as error:
        raise typer.Exit(explain(error)) from error
    print(f"{output}: {record['params']:,} parameters, final loss {record['log'][-1][1]:.3f}")


def pick_device(name: str) -> torch.device:
    """The device called auto, cpu or cuda.

    Raises:
        UsageError: another name.
        DeviceError: cuda on a machine without it.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"unknown device '{name}'", hint="one of: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("no CUDA device was found", hint="try --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def fit(
    corpus: Corpus, settings: Settings, device: torch.device
) -> tuple[MambaForCausalLM, dict[str, Any]]:
    """Train a new model on `corpus`; return it with the record that training.json holds."""
    model = new_model(settings, len(corpus.tokenizer)).to(device)
    with _progress() as progress:
        task = progress.add_task("training", total=settings.steps, loss=math.nan)
        curve = train(
            model,
            corpus.tokens,
            settings,
            lambda step, loss: progress.update(task, completed=step, loss=loss),
        )
    record = _record(corpus, settings, model, curve)
    if corpus.held_out is not None:
        loss = validation_loss(model, corpus.held_out, settings)
        record |= {"val_loss": loss, "val_ppl": math.exp(loss)}
    return model, record


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=log,
    )


def _record(
    corpus: Corpus, settings: Settings, model: MambaForCausalLM, curve: list[tuple[int, float]]
) -> dict[str, Any]:
    return {
        "arch": "mamba",
        "params": model.num_parameters(),
        "d_model": settings.d_model,
        "layers": settings.layers,
        "state": settings.state,
        "vocabulary": len(corpus.tokenizer),
        "steps": settings.steps,
        "tokens": settings.steps * settings.batch * settings.length,
        "train_tokens": len(corpus.tokens),
        "seq": settings.length,
        "batch": settings.batch,
        "lr": settings.lr,
        "seed": settings.seed,
        "device": model.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sources": [source.summary() for source in corpus.sources],
        "log": curve,
    }


def explain(error: BaseException) -> int:
    """Print what went wrong and what to do next on stderr; return the exit code."""
    match error:
        case SsmcError():
            message, hint, code = str(error), error.hint, error.exit_code
        case torch.OutOfMemoryError():
            message, hint, code = "out of GPU memory", "try a smaller --batch", 4
        case KeyboardInterrupt():
            message, hint, code = "interrupted; nothing was written", None, 130
        case _:
            message, hint, code = f"cannot write the model: {error}", None, 2
    for line in filter(None, (f"error: {message}", hint)):
        log.print(line, markup=False, highlight=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    app()
