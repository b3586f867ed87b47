"""`ssmc eval`."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ssmc.cli import output

OVERLAP = 0.01  # from here on a text is no longer one that calibration has not seen


def run(
    target: Annotated[str, typer.Argument(help="A model or an artefact.")],
    text: Annotated[
        Path | None, typer.Option(help="Text to score, .jsonl or .txt (default: the embedded).")
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 512,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many windows.")] = None,
    mode: Annotated[str, typer.Option(help="prefill or recurrent: token by token.")] = "prefill",
    execution: Annotated[
        str, typer.Option(help="Of an artefact: lowered, or simulated in float.")
    ] = "lowered",
    by_length: Annotated[
        bool, typer.Option("--by-length", help="Also by how many tokens went before.")
    ] = False,
    last_word: Annotated[
        Path | None,
        typer.Option(help="Passages whose last word is to be said, .jsonl: also how often it is."),
    ] = None,
    passages: Annotated[int | None, typer.Option(min=1, help="At most this many of them.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Windows at a time.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda: where it runs.")] = "auto",
    backend: Annotated[
        str, typer.Option(help="Of an artefact: auto, reference, cpu or triton.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Perplexity of a model or an artefact on windows of text that do not overlap."""
    from ssmc import evaluate
    from ssmc.cli.target import check_choice, open_target
    from ssmc.corpus import read_texts
    from ssmc.demo import evaluation_file

    check_choice("mode", mode, ("prefill", "recurrent"))
    check_choice("execution", execution, ("lowered", "simulated"))
    opened = open_target(target, backend, device)
    if opened.compiled is not None:
        opened.compiled.execution = execution  # type: ignore[assignment]
    windows = opened.windows(text or evaluation_file(), window, limit)
    start = time.perf_counter()
    with output.progress(f"scoring {target}") as report:
        size = batch or (8 if mode == "prefill" else 64)
        result = evaluate.perplexity(opened.run, windows, mode, size, report)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    said = None
    if last_word is not None:
        texts, encoder = read_texts(last_word)[:passages], opened.encoder()
        with output.progress(f"last words {target}") as report:
            said = evaluate.last_word(opened.run, encoder[0], texts, encoder[1], progress=report)
    overlap = opened.overlap(windows)
    if as_json:
        about = {"target": target, "mode": mode, "seconds": seconds, "calibration_overlap": overlap}
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


def _say_overlap(share: float) -> None:
    """What share of the text is in the calibration text, and what that means where it is much."""
    from ssmc.overlap import RUN

    output.say(f"overlap      {share:.1%} of its runs of {RUN} tokens are in the calibration text")
    if share > OVERLAP:
        output.note("this text was calibrated on: its perplexity says too little about other text")
