"""Passes registered by a test are gone after it."""

from __future__ import annotations

import pytest

from ssmc.core import passes


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_registered", dict(passes._registered))
