"""Running compiled models: states, generation, artefacts on disk."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssmc.runtime.artefact import Artefact, is_artefact, read_artefact, write_artefact
    from ssmc.runtime.model import CompiledModel, choose_backend, load
    from ssmc.runtime.session import Session

_HOMES = {
    **dict.fromkeys(("Artefact", "is_artefact", "read_artefact", "write_artefact"), "artefact"),
    **dict.fromkeys(("CompiledModel", "choose_backend", "load"), "model"),
    "Session": "session",
}

__all__ = [
    "Artefact",
    "CompiledModel",
    "Session",
    "choose_backend",
    "is_artefact",
    "load",
    "read_artefact",
    "write_artefact",
]


def __getattr__(name: str) -> Any:  # the text of tokens, `text`, is wanted where torch is not
    if name in _HOMES:
        return getattr(importlib.import_module(f"ssmc.runtime.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'ssmc.runtime' has no attribute '{name}'")
