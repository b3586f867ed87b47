"""`ssmc eval`."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ssmc.cli import completion, output

if TYPE_CHECKING:
    from ssmc.cli.target import Target
    from ssmc.core.ranks import Ranks
    from ssmc.evaluate import LastWord

OVERLAP = 0.01  # from here on a text is no longer one that calibration has not seen


def run(
    target: Annotated[
        str, typer.Argument(help="A model or an artefact.", autocompletion=completion.target)
    ],
    text: Annotated[
        Path | None, typer.Option(help="Text to score, .jsonl or .txt (default: the embedded).")
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 512,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most this many windows, or documents a task.")
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="prefill or recurrent: token by token.",
            autocompletion=completion.words("prefill", "recurrent"),
        ),
    ] = "prefill",
    execution: Annotated[
        str,
        typer.Option(
            help="Of an artefact: lowered, or simulated in float.",
            autocompletion=completion.words("lowered", "simulated"),
        ),
    ] = "lowered",
    by_length: Annotated[
        bool, typer.Option("--by-length", help="Also by how many tokens went before.")
    ] = False,
    last_word: Annotated[
        Path | None,
        typer.Option(help="Passages whose last word is to be said, .jsonl: also how often it is."),
    ] = None,
    passages: Annotated[int | None, typer.Option(min=1, help="At most this many of them.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval to score instead: lambada_openai,piqa.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="With --tasks: solved examples before a question.")
    ] = None,
    include: Annotated[
        list[Path] | None, typer.Option(help="Folder with tasks of your own, in YAML.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="With --tasks: the model to compare with, or none.",
            autocompletion=completion.target_or("none"),
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Windows or requests at a time.")] = None,
    device: Annotated[
        str,
        typer.Option(help="auto, cpu or cuda: where it runs.", autocompletion=completion.DEVICES),
    ] = "auto",
    backend: Annotated[
        str,
        typer.Option(
            help="Of an artefact: auto, reference, cpu or triton.",
            autocompletion=completion.BACKENDS,
        ),
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Perplexity of a model or an artefact on windows of text, or its scores on tasks."""
    from ssmc import evaluate
    from ssmc.cli import tasks as scores
    from ssmc.cli.target import check_choice, choose_execution, open_target
    from ssmc.demo import evaluation_file

    with output.of_first_rank() as ranks:
        check_choice("mode", mode, ("prefill", "recurrent"))
        of_text = bool(text or last_word or passages) or by_length or mode != "prefill"
        of_tasks = bool(include or baseline) or num_fewshot is not None
        scores.check_options(tasks, of_tasks, of_text)
        asked = scores.find(tasks, include or ()) if tasks is not None else None
        opened = open_target(target, backend, device)
        choose_execution(opened, execution)
        if asked is not None:
            other = scores.find_baseline(opened, baseline, device, ranks)
            found = scores.score_tasks(opened, other, asked, limit, batch, num_fewshot, ranks)
            return output.say_json(found) if as_json else scores.show(found)
        windows = opened.windows(text or evaluation_file(), window, limit)
        start = time.perf_counter()
        with output.progress(f"scoring {target}") as report:
            size = batch or (8 if mode == "prefill" else 64)
            result = evaluate.perplexity(opened.run, windows, mode, size, report, ranks)  # type: ignore[arg-type]
        seconds = time.perf_counter() - start
        said = (
            None if last_word is None else _last_words(target, opened, last_word, passages, ranks)
        )
        overlap = opened.overlap(windows)
        if as_json:
            about = {
                "target": target,
                "mode": mode,
                "seconds": seconds,
                "calibration_overlap": overlap,
            }
            words = {"last_word": asdict(said)} if said else {}
            output.say_json(about | asdict(result) | words)
            return
        output.say(f"target       {target}")
        output.say(
            f"perplexity   {result.perplexity:.4f}   {result.tokens} tokens in "
            f"{result.windows} windows of {window}, {mode}   {seconds:.1f} s"
        )
        for part in result.by_length if by_length else ():
            output.say(f"{part.first:>6}-{part.last:<6}{part.perplexity:.4f}")
        if said is not None:
            output.say(f"last word    {said.accuracy:.1%} of {said.passages} passages")
        if overlap is not None:
            _say_overlap(overlap)


def _last_words(
    target: str, opened: Target, file: Path, limit: int | None, ranks: Ranks
) -> LastWord:
    """How many of the first `limit` passages in a file the model continues by their last word."""
    from ssmc.corpus import read_texts
    from ssmc.evaluate import last_word

    texts, (tokenizer, eos) = read_texts(file)[:limit], opened.encoder()
    with output.progress(f"last words {target}") as report:
        return last_word(opened.run, tokenizer, texts, eos, progress=report, ranks=ranks)


def _say_overlap(share: float) -> None:
    """What share of the text is in the calibration text, and what that means where it is much."""
    from ssmc.overlap import RUN

    output.say(f"overlap      {share:.1%} of its runs of {RUN} tokens are in the calibration text")
    if share > OVERLAP:
        output.note("this text was calibrated on: its perplexity says too little about other text")
