"""`ssmc generate`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmc.cli import options, output

if TYPE_CHECKING:
    from torch import Tensor

    from ssmc.cli.target import Target
    from ssmc.runtime.sampling import Sampling
    from ssmc.runtime.text import Continuation, Ending


def run(
    target: options.TargetName,
    prompt: Annotated[str | None, typer.Option(help="The text to go on from.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file of several: .jsonl with prompt, or one a line.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Of several, this many at a time.")] = 16,
    tokens: options.Tokens = 64,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    penalty: options.Penalty = 1.0,
    stop: options.Stop = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    backend: options.Backend = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    as_lines: Annotated[
        bool, typer.Option("--jsonl", help="One JSON object a prompt, on a line each.")
    ] = False,
) -> None:
    """Continue a prompt, or each of several."""
    from ssmc.cli.target import open_target
    from ssmc.errors import UsageError
    from ssmc.runtime.sampling import Sampling

    if as_json and as_lines:
        raise UsageError("two kinds of output", hint="give either --json or --jsonl")
    requests = _requests(prompt, prompts)
    sampling = Sampling(temperature, top_k, top_p, min_p, penalty, seed)
    opened = open_target(target, backend, device)
    writer = _Writer(opened, tokens, sampling, options.make_ending(opened, stop))
    ids = [opened.encode(r["prompt"], _name(i, prompts)) for i, r in enumerate(requests, 1)]
    start = time.perf_counter()
    if prompt is not None and not as_json and not as_lines:
        results = [writer.show(prompt, ids[0])]
    else:
        results = []
        for result in writer.results(requests, ids, batch):
            results.append(result)
            _say(result, as_json, as_lines, several=prompts is not None)
    seconds = time.perf_counter() - start
    if as_json:
        made = results[0] if prompts is None else {"results": results}
        output.say_json({"target": target} | made | {"seconds": seconds})
    else:
        output.note(f"{sum(len(r['tokens']) for r in results)} tokens in {seconds:.2f} s")


def _requests(prompt: str | None, prompts: Path | None) -> list[dict[str, Any]]:
    from ssmc.corpus import read_prompts
    from ssmc.errors import UsageError

    if prompts is not None and prompt is None:
        return read_prompts(prompts)
    if prompt is None or prompts is not None:
        raise UsageError(
            "there is nothing to go on from" if prompt is None else "two kinds of prompts",
            hint="give either --prompt TEXT or --prompts FILE",
        )
    return [{"prompt": prompt}]


def _name(number: int, prompts: Path | None) -> str:
    return "the prompt" if prompts is None else f"prompt {number} of {prompts}"


def _say(result: dict[str, Any], as_json: bool, as_lines: bool, several: bool) -> None:
    if as_lines:
        output.say_json_line(result)
    elif not as_json:
        output.say(result["prompt"] + result["text"] + ("\n" if several else ""))


@dataclass(frozen=True)
class _Writer:
    """What continues prompts, and how."""

    target: Target
    tokens: int
    sampling: Sampling
    ending: Ending

    def show(self, prompt: str, ids: Tensor) -> dict[str, Any]:
        """Continue one prompt, shown as it comes; the line ends even where that is interrupted."""
        output.say_part(prompt)
        try:
            (row,) = self._continue([ids], 0, output.say_part)
        finally:
            output.say("")
        return {"tokens": row.tokens}

    def results(
        self, requests: Sequence[dict[str, Any]], ids: Sequence[Tensor], batch: int
    ) -> Iterator[dict[str, Any]]:
        """Each request and what it became, `batch` at a time; number n draws by seed + n."""
        for first in range(0, len(ids), batch):
            for at, row in enumerate(self._continue(ids[first : first + batch], first), first):
                made = {"text": row.text, "tokens": row.tokens, "ended": row.ended}
                yield requests[at] | made | {"seed": self.sampling.seed + at}

    def _continue(
        self, prompts: Sequence[Tensor], first: int, show: Callable[[str], None] = lambda text: None
    ) -> list[Continuation]:
        from ssmc.runtime.generate import follow, stream
        from ssmc.runtime.text import Continuation

        sampling = replace(self.sampling, seed=self.sampling.seed + first)
        rows = [Continuation(self.ending, ids.tolist()) for ids in prompts]
        for pieces in follow(stream(self.target.run, prompts, self.tokens, sampling), rows):
            show(pieces[0])
        rests = [row.finish() for row in rows]
        show(rests[0])
        return rows
