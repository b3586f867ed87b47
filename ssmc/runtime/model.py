"""A compiled model: its quantised graph, and that graph lowered to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import nn

from ssmc.core import Graph, States
from ssmc.lowering import Lowered, lower
from ssmc.runtime.artefact import TENSORS, Artefact, read_artefact, write_artefact
from ssmc.runtime.generate import Sampling, generate

Execution = Literal["simulated", "lowered"]


class CompiledModel(nn.Module):
    """A model that came out of the compiler or off the disk.

    `graph` is the quantised graph, which simulates; `lowered` the one that runs in integers.
    Calls go to one of them by `execution`. `about` is what `ssmc.json` holds, `report` one record a
    pass; `tokenizer` is None where the model has none.
    """

    def __init__(self, artefact: Artefact, backend: str = "auto") -> None:
        super().__init__()
        self.artefact = artefact
        self.backend = "cpu" if backend == "auto" else backend
        self.execution: Execution = "lowered"
        self.tokenizer = Tokenizer.from_str(artefact.tokenizer) if artefact.tokenizer else None
        self.lowered: Lowered = lower(artefact.graph, self.backend)

    @property
    def graph(self) -> Graph:
        """The quantised graph."""
        return self.artefact.graph

    @property
    def about(self) -> dict[str, Any]:
        """Source, recipe, calibration, metrics."""
        return self.artefact.about

    @property
    def report(self) -> dict[str, Any]:
        """What each pass did, what was lowered, and the numerics a block."""
        return self.artefact.report

    @property
    def eos(self) -> int | None:
        """The id of the token that ends a text."""
        return self.about.get("eos")

    def program(self) -> Graph:
        """The graph that calls run."""
        return self.lowered.graph if self.execution == "lowered" else self.graph

    def forward(self, *inputs: torch.Tensor, states: States | None = None) -> tuple[Any, States]:
        """The result and the new states; for a language model logits [batch, length, vocabulary].

        States start fresh where none are given. Those of simulated and lowered execution have
        different dtypes and do not mix.
        """
        return self.program()(*inputs, states=states)

    def generate(
        self, ids: torch.Tensor, max_new_tokens: int = 64, sampling: Sampling | None = None
    ) -> torch.Tensor:
        """`ids` [batch, length] with up to `max_new_tokens` tokens behind; greedy by default."""
        return generate(self, ids, max_new_tokens, sampling, self.eos)

    def size(self, out: str | Path) -> dict[str, Any]:
        """Bytes of the artefact in `out`, and its tensors' share of the 16-bit model's."""
        files = {p.name: p.stat().st_size for p in sorted(Path(out).iterdir())}
        before = self.about["source"].get("float_bytes")
        ratio = files[TENSORS] / before if before else None
        return files | {"float_bytes": before, "ratio": ratio}

    def save(self, out: str | Path, *, force: bool = False) -> Path:
        """Write the artefact to the folder `out`, whole or not at all."""
        return write_artefact(self.artefact, out, force=force)


def load(path: str | Path, backend: str = "auto") -> CompiledModel:
    """The artefact in the folder `path`, checked and lowered for `backend`.

    Raises ArtefactError naming the file that is missing, truncated, altered or too new.
    """
    return CompiledModel(read_artefact(path), backend)
