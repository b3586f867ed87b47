"""The command line, called in this process."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from ssmc.cli.main import main


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout, and nothing else."""
        data = json.loads(self.out)
        assert data["schema"] == 1
        return dict(data)

    @property
    def error(self) -> str:
        """The one message on stderr, with what is next; no traceback."""
        lines = [line for line in self.err.splitlines() if not line.startswith(("loading", "("))]
        assert lines[0].startswith("error: "), self.err
        assert len(lines) <= 2
        assert all(line.startswith("  ") for line in lines[1:])
        assert "Traceback" not in self.err
        return "\n".join(lines)


Call = Callable[..., Ended]


def on_terminal(*arguments: str, **environment: str) -> str:
    """What a python process with these arguments writes to stderr where that is a terminal."""
    control, terminal = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | environment
    env |= {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=terminal, env=env
    ):
        os.close(terminal)
        chunks = []
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while chunk := os.read(control, 65536):
                chunks.append(chunk)
    os.close(control)
    return b"".join(chunks).decode()


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """`call("eval", folder)`: run a command and say how it ended."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: Any) -> Ended:
        monkeypatch.setattr(sys, "argv", ["ssmc", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return Ended(int(ended.value.code or 0), out, err)

    return run


def legible(ended: Ended) -> list[str]:
    """The lines of stdout of a command that went well: plain, at most 100 columns."""
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in ended.out + ended.err
    return lines
