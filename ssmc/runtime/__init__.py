"""Running compiled models: states, generation, artefacts on disk."""

from ssmc.runtime.artefact import Artefact, is_artefact, read_artefact, write_artefact
from ssmc.runtime.model import CompiledModel, load

__all__ = ["Artefact", "CompiledModel", "is_artefact", "load", "read_artefact", "write_artefact"]
