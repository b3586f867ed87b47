"""Passes registered by a test are gone after it."""

from __future__ import annotations

import pytest

from ssmc.core import find_pass, known_passes, passes


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in known_passes():
        find_pass(name)  # a module is imported once, so it registers its pass once
    monkeypatch.setattr(passes, "_registered", dict(passes._registered))
