"""`ssmc generate`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from ssmc.cli import output


def run(
    target: Annotated[str, typer.Argument(help="A model or an artefact.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="At most this many.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="0 is greedy; above it, tokens are drawn.")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest only.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda: where it runs.")] = "auto",
    backend: Annotated[
        str, typer.Option(help="Of an artefact: auto, reference, cpu or triton.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Continue a prompt."""
    import torch

    from ssmc.cli.target import open_target
    from ssmc.errors import UsageError
    from ssmc.runtime.generate import Sampling, generate

    sampling = Sampling(temperature, top_k, seed)
    opened = open_target(target, backend, device)
    tokenizer, eos = opened.encoder()
    encoded = tokenizer.encode(prompt, add_special_tokens=False).ids
    ids = torch.tensor([encoded], dtype=torch.int64, device=opened.device)
    if ids.shape[1] == 0:
        raise UsageError("the prompt is empty", hint="give --prompt TEXT")
    start = time.perf_counter()
    new = generate(opened.run, ids, tokens, sampling, eos)[0, ids.shape[1] :].tolist()
    seconds = time.perf_counter() - start
    text = tokenizer.decode([t for t in new if t != eos])
    if as_json:
        output.say_json(
            {"target": target, "prompt": prompt, "text": text, "tokens": new, "seconds": seconds}
        )
    else:
        output.say(prompt + text)
        output.note(f"{len(new)} tokens in {seconds:.2f} s")
