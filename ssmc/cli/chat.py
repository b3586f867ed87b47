"""`ssmc chat`."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from ssmc.cli import options, output

if TYPE_CHECKING:
    from ssmc.runtime.chat import Chat

HELP = """\
/reset  begin a new conversation
/help   this list
/quit   end (or Ctrl-D)
Ctrl-C stops an answer; what there is of it stays in the conversation"""


def run(
    target: options.TargetName,
    system: Annotated[str, typer.Option(help="What the model is told before it begins.")] = "",
    tokens: options.Tokens = 512,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    penalty: options.Penalty = 1.0,
    stop: options.Stop = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    backend: options.Backend = "auto",
) -> None:
    """Talk with a model, a message a line."""
    from ssmc.cli.target import open_target
    from ssmc.runtime.chat import Chat
    from ssmc.runtime.sampling import Sampling
    from ssmc.runtime.template import PLAIN, ChatTemplate

    sampling = Sampling(temperature, top_k, top_p, min_p, penalty, seed)
    opened = open_target(target, backend, device)
    ending, (tokenizer, _) = options.make_ending(opened, stop), opened.encoder()
    template = PLAIN if opened.chat is None else ChatTemplate(**opened.chat)
    chat = Chat(opened.session(), template, tokenizer, ending, sampling, tokens, system)
    if template is PLAIN:
        output.note(f"{target} has no chat template: plain lines of User: and Assistant:")
    if sys.stdin.isatty():
        output.note("/help lists what can be typed besides messages")
    for line in filter(None, map(str.strip, _lines())):
        if line == "/quit":
            break
        _answer(chat, line)


def _lines() -> Iterator[str]:
    """What is typed or piped in, line by line; Ctrl-C while typing gives the line up."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited then
    while True:
        try:
            line = input("> ")
        except EOFError:
            output.say("")
            return
        except KeyboardInterrupt:
            output.note("\n/quit or Ctrl-D ends the chat")
            continue
        yield line


def _answer(chat: Chat, line: str) -> None:
    """Do what a line says: a command, or a message."""
    if line == "/help":
        output.note(HELP)
    elif line == "/reset":
        chat.reset()
        output.note("a new conversation")
    elif line.startswith("/"):
        output.note(f"there is no {line.split()[0]}; /help lists what there is")
    else:
        _say(chat, line)


def _say(chat: Chat, message: str) -> None:
    begun = False
    with _ctrl_c() as pressed:
        for piece in chat.say(message, until=pressed):
            shown = piece if begun else piece.lstrip()
            begun = begun or bool(shown)
            output.say_part(shown)
    output.say("")


@contextlib.contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, which stops nothing by itself; the second time it does.

    What it stopped would be anywhere, in the middle of writing states for example.
    """
    pressed: list[int] = []

    def remember(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
