"""Options of the commands that generate text, spelt and described once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ssmc.cli import completion

if TYPE_CHECKING:
    from ssmc.cli.target import Target
    from ssmc.runtime.text import Ending

TargetName = Annotated[
    str,
    typer.Argument(
        metavar="TARGET", help="A model or an artefact.", autocompletion=completion.target
    ),
]
Tokens = Annotated[
    int, typer.Option("--tokens", "--max-new-tokens", "-n", min=1, help="At most this many.")
]
Temperature = Annotated[float, typer.Option(help="0 is greedy; above it, tokens are drawn.")]
TopK = Annotated[int | None, typer.Option(help="Draw from the k likeliest only.")]
TopP = Annotated[float, typer.Option(help="Draw from the fewest that are this likely together.")]
MinP = Annotated[float, typer.Option(help="Drop those less likely than this times the likeliest.")]
Penalty = Annotated[
    float, typer.Option("--repetition-penalty", help="Above 1: what is there is less likely.")
]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may come repeatedly.")]
Seed = Annotated[int, typer.Option(help="Seed of the draw.")]
Device = Annotated[
    str, typer.Option(help="auto, cpu or cuda: where it runs.", autocompletion=completion.DEVICES)
]
Backend = Annotated[
    str,
    typer.Option(
        help="Of an artefact: auto, reference, cpu or triton.", autocompletion=completion.BACKENDS
    ),
]


def make_ending(target: Target, stop: list[str] | None) -> Ending:
    """What ends a text: the end-of-text token of `target`, or one of the strings `stop`."""
    from ssmc.runtime.text import Ending

    tokenizer, eos = target.encoder()
    return Ending(frozenset([eos]), tuple(stop or ()), tokenizer)
