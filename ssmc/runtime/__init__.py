"""Running compiled models: states, generation, artefacts on disk."""

from ssmc.runtime.artefact import Artefact, is_artefact, read_artefact, write_artefact
from ssmc.runtime.model import CompiledModel, choose_backend, load
from ssmc.runtime.session import Session

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
