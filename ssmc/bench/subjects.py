"""What can be measured: something with weights that runs sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ssmc.core import Graph
from ssmc.runtime import CompiledModel
from ssmc.runtime.generate import Decoder
from ssmc.runtime.session import Session


class Runner(Decoder, Protocol):
    """The sequences of one batch, with their states."""

    def reset(self) -> None:
        """Start afresh."""


class Subject(Protocol):
    """A model under its name, the bytes its weights take, and the ids it knows, 0 to vocabulary."""

    @property
    def name(self) -> str:
        """What tables call it."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the tensors that a call reads, tied ones once."""

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""

    def open(self, batch: int) -> Runner:
        """A runner of `batch` sequences."""


@dataclass(frozen=True)
class Compiled:
    """A compiled model, by sessions: recorded as CUDA graphs where it can."""

    name: str
    model: CompiledModel

    @property
    def weight_bytes(self) -> int:
        """Bytes of the lowered model's tensors."""
        return self.model.weight_bytes()

    @property
    def vocabulary(self) -> int:
        """The rows of the embedding."""
        return vocabulary(self.model.graph)

    def open(self, batch: int) -> Runner:
        """A session."""
        return self.model.session(batch)

    def reference(self) -> Compiled:
        """The same model by the definitions of its operators, on the same device."""
        return Compiled(
            f"{self.name} (reference)",
            CompiledModel(self.model.artefact, "reference", str(self.model.device)),
        )


@dataclass(frozen=True)
class Traced:
    """A float model as it was traced, run operator by operator."""

    name: str
    graph: Graph
    device: torch.device

    @property
    def weight_bytes(self) -> int:
        """Bytes of the graph's parameters."""
        return sum(tensor.nbytes for tensor in self.graph.params().values())

    @property
    def vocabulary(self) -> int:
        """The rows of the embedding."""
        return vocabulary(self.graph)

    def open(self, batch: int) -> Runner:
        """A session of the graph itself."""
        return Session(lambda form: self.graph, batch, self.device)


def vocabulary(graph: Graph) -> int:
    """The extent of the logits of a language model's graph."""
    return int(graph.result.meta["val"].shape[-1])
