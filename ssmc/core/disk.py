"""Files that survive what comes next, and files of JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ssmc.errors import UsageError


def sync(path: Path) -> None:
    """Return when the file, or the folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UsageError, with the line, for a file that holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path}, line {error.lineno}: {error.msg}", hint="the file must be one JSON object"
        ) from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not text", hint="the file must be JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}, line 1: a {type(value).__name__}, not a JSON object")
    return value
