"""The range of transformers versions, and that importing the package does not import it."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ssmc.errors import UnsupportedError
from ssmc.frontend import huggingface


@pytest.fixture(autouse=True)
def _checked_anew() -> Iterator[None]:
    huggingface.library.cache_clear()
    yield
    huggingface.library.cache_clear()


@pytest.mark.parametrize(
    ("version", "warns"),
    [
        ("5.17.0", False),
        ("5.23.4", False),
        ("5.16.9", True),
        ("5.24.0.dev0", True),
        ("4.57.1", True),
    ],
)
def test_version_outside_the_range_warns(
    version: str, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    with caplog.at_level(logging.WARNING, logger="ssmc"):
        huggingface.library()
    assert [version in record.getMessage() for record in caplog.records] == [True] * warns


def test_missing_names_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "_NEEDED", ("AutoConfig", "Mamba9Config"))
    with pytest.raises(UnsupportedError, match="has no Mamba9Config"):
        huggingface.library()


def test_importing_the_front_end_does_not_import_transformers() -> None:
    code = "import sys, ssmc.frontend; print('transformers' in sys.modules)"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "False"
