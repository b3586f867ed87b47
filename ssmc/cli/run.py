"""`ssmc run`. Nothing here imports torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ssmc.cli import completion, options, output


def run(
    program: Annotated[
        Path,
        typer.Argument(
            help="What ssmc export --format native wrote.", autocompletion=completion.native
        ),
    ],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    tokens: options.Tokens = 64,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = 1.0,
    stop: options.Stop = None,
    seed: options.Seed = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads (as many as there are processors).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Continue a prompt by a native program, without torch."""
    from ssmc.errors import UsageError
    from ssmc.native import load
    from ssmc.native.model import is_program
    from ssmc.native.sampling import Sampling
    from ssmc.runtime.text import Continuation, Ending

    if not is_program(program):
        raise UsageError(
            f"{program} is no native program", hint="ssmc export OUT --format native writes one"
        )
    sampling = Sampling(temperature, top_k, top_p, seed)
    start = time.perf_counter()
    model = load(program, threads)
    tokenizer = model.tokenizer()
    ids = tokenizer.encode(_checked(prompt), add_special_tokens=False).ids
    eos = frozenset() if model.eos is None else frozenset([model.eos])
    row = Continuation(Ending(eos, tuple(stop or ()), tokenizer), ids)
    show = (lambda text: None) if as_json else output.say_part
    show(prompt)
    try:
        for token in model.generate(ids, tokens, sampling):
            show(row.add(token))
            if row.ended:
                break
        show(row.finish())
    finally:
        show("\n")
    seconds = time.perf_counter() - start
    if as_json:
        made = {"prompt": prompt, "text": row.text, "tokens": row.tokens, "ended": row.ended}
        output.say_json({"program": str(program)} | made | {"seconds": seconds})
    else:
        output.note(f"{len(row.tokens)} tokens in {seconds:.2f} s")


def _checked(prompt: str) -> str:
    """Raise UsageError for a prompt that is no text."""
    from ssmc.corpus import is_text
    from ssmc.errors import UsageError

    if not is_text(prompt):
        raise UsageError("the prompt is not UTF-8 text", hint="check how it is encoded")
    if not prompt:
        raise UsageError("the prompt is empty", hint="give some text to go on from")
    return prompt
