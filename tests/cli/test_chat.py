"""`ssmc chat`, with lines piped in and on a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import ssmc
from ssmc.cli import output
from ssmc.runtime.chat import Chat
from ssmc.runtime.sampling import Sampling
from ssmc.runtime.template import PLAIN
from ssmc.runtime.text import Ending

from .conftest import Call, Ended

TEMPLATE = "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}"


@pytest.fixture
def typed(call: Call, monkeypatch: pytest.MonkeyPatch) -> Call:
    """`typed(lines, target, *options)`: a chat with lines piped in."""

    def run(lines: str, *arguments: object) -> Ended:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return call("chat", *arguments)

    return run


def expected(target: Path, lines: list[str], tokens: int, **sampling: float) -> list[str]:
    """The answers of a chat in Python."""
    model = ssmc.load(target)
    assert model.tokenizer is not None
    options = Sampling(**sampling)  # type: ignore[arg-type]
    ending = Ending(frozenset({0}))
    chat = Chat(model.session(), PLAIN, model.tokenizer, ending, options, tokens)
    return ["".join(chat.say(line)).lstrip() for line in lines]


def test_answers_go_to_stdout(typed: Call, tiny_artefact: Path) -> None:
    options = ("-n", 5, "--temperature", 2, "--seed", 3)
    ended = typed("w3 w5\n\n  w7 \n/quit\nw9\n", tiny_artefact, *options)
    answers = expected(tiny_artefact, ["w3 w5", "w7"], 5, temperature=2.0, seed=3)
    assert (ended.code, ended.out) == (0, "".join(f"{answer}\n" for answer in answers))
    assert "has no chat template: plain lines of User: and Assistant:" in ended.err
    assert "/help" not in ended.err


def test_reset_help_and_what_there_is_not(typed: Call, tiny_artefact: Path) -> None:
    ended = typed("w3\n/reset\nw3\n/help\n/rest now\n", tiny_artefact, "-n", 5)
    first, again = ended.out.splitlines()
    assert first == again
    assert "a new conversation" in ended.err
    assert all(f"\n{command}" in ended.err for command in ("/reset", "/help", "/quit"))
    assert "there is no /rest; /help lists what there is" in ended.err


@pytest.mark.parametrize("which", ["model", "artefact"])
def test_the_template_of_the_tokenizer(
    typed: Call, tiny_folder: Path, tmp_path: Path, which: str
) -> None:
    target = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    config = {"chat_template": TEMPLATE, "eos_token": "w7"}
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    if which == "artefact":
        text = target / "text.txt"
        compiled = ssmc.compile(str(target), calibration=text, samples=2, length=16)
        target = compiled.save(tmp_path / "out")
    ended = typed("w3 w5\nw9\n", target, "-n", 5, "--system", "w2")
    assert ended.code == 0, ended.err
    assert len(ended.out.splitlines()) == 2
    assert "no chat template" not in ended.err


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    typed: Call, tiny_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, said, pieces = signal.getsignal(signal.SIGINT), output.say_part, iter(range(1000))

    def interrupted(text: str) -> None:
        said(text)
        if next(pieces) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(output, "say_part", interrupted)
    ended = typed("w3\nw5\n", tiny_artefact, "-n", 30)
    first, second = ended.out.splitlines()
    whole = expected(tiny_artefact, ["w3"], 30)[0].split()
    assert ended.code == 0
    assert first.split() == whole[:4]
    assert len(second.split()) > 4
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_ctrl_c_ends_it(
    typed: Call, tiny_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(text: str) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(output, "say_part", interrupted)
    assert typed("w3\nw5\n", tiny_artefact, "-n", 30).code == 130
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature -1.0"),
        (["--stop", ""], "a stop string is empty"),
        (["--device", "cuda:97"], "there is no device cuda:97"),
    ],
)
def test_refuses(typed: Call, tiny_artefact: Path, arguments: list[str], message: str) -> None:
    ended = typed("w3\n", tiny_artefact, *arguments)
    assert ended.code in (2, 4)
    assert message in ended.error


# -- on a terminal ----------------------------------------------------------------------------


PROMPT = "\r\n> "


class Terminal:
    """A process with a terminal of its own, and what it has shown."""

    def __init__(self, *arguments: str) -> None:
        self.control, terminal = pty.openpty()
        env = os.environ | {"TERM": "dumb", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "ssmc", *arguments]
        self.process = subprocess.Popen(
            command, stdin=terminal, stdout=terminal, stderr=terminal, env=env,
            start_new_session=True, preexec_fn=lambda: _control(terminal),
        )  # fmt: skip
        os.close(terminal)
        self.shown = ""

    def shows(self, text: str, times: int = 1, seconds: float = 100) -> bool:
        """Whether `text` has been shown so many times before the time is over."""
        limit = time.monotonic() + seconds
        while self.shown.count(text) < times:
            if not select.select([self.control], [], [], max(0, limit - time.monotonic()))[0]:
                return False
            self.shown += os.read(self.control, 65536).decode()
        return True

    def type(self, keys: str) -> None:
        os.write(self.control, keys.encode())

    def interrupts(self, text: str) -> bool:
        """Whether Ctrl-C has `text` shown within ten seconds."""
        self.type("\x03")
        return self.shows(text, seconds=10)

    def close(self) -> int:
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while chunk := os.read(self.control, 65536):
                self.shown += chunk.decode()
        os.close(self.control)
        return self.process.wait()


def _control(terminal: int) -> None:
    """Make the terminal that of the session, so that Ctrl-C in it is a signal."""
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(tiny_artefact: Path) -> Iterator[Terminal]:
    found = Terminal("chat", str(tiny_artefact), "-n", "1000000")
    yield found
    if found.process.poll() is None:
        found.process.kill()
        found.process.wait()


@pytest.mark.slow
def test_on_a_terminal(terminal: Terminal) -> None:
    assert terminal.shows(PROMPT)
    assert "/help lists what can be typed" in terminal.shown
    terminal.type("half a line")
    assert terminal.shows("half a line")  # so that Ctrl-C finds someone reading
    # Python notices a signal that comes just before it waits for a key with the next one only.
    assert any(terminal.interrupts("/quit or Ctrl-D ends the chat") for _ in range(10))
    assert terminal.shows(PROMPT, 2)
    for answer in (1, 2):
        terminal.type("w3 w5\n")
        assert terminal.shows(" ", 150 * answer), terminal.shown  # goes on and on
        terminal.type("\x03")
        assert terminal.shows(PROMPT, 2 + answer), terminal.shown[-500:]
    terminal.type("\x04")
    assert terminal.close() == 0
    assert "Traceback" not in terminal.shown
