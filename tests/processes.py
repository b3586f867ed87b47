"""Processes as torchrun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any

COMMAND = "from ssmc.cli.main import main; main()"
"""A script that is ssmc's command line."""


def start(count: int, script: str, *args: str, **more: Any) -> list[subprocess.Popen[str]]:
    """Processes as torchrun starts them, each with the script."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, *args],
            env={**os.environ, **world, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more,
        )
        for rank in range(count)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each wrote to stdout; all have ended well."""
    told = [process.communicate(timeout=240) for process in processes]
    for process, (_, errors) in zip(processes, told, strict=True):
        assert process.returncode == 0, errors
    return [out for out, _ in told]
