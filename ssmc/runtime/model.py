"""A compiled model: its quantised graph, and that graph lowered to run."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import nn

from ssmc.core import Graph, States
from ssmc.device import find_device, move, running_on
from ssmc.errors import DeviceError, UsageError
from ssmc.lowering import Form, Lowered, lower
from ssmc.runtime.arguments import generate
from ssmc.runtime.artefact import TENSORS, Artefact, read_artefact, write_artefact
from ssmc.runtime.capture import Recorder
from ssmc.runtime.padding import real_tokens, run_padded
from ssmc.runtime.replay import TapeRecorder
from ssmc.runtime.session import LARGEST_PIECE, Session

Execution = Literal["simulated", "lowered"]


class CompiledModel(nn.Module):
    """A model that came out of the compiler or off the disk.

    `graph` is the quantised graph, which simulates; `lowered` the one that runs in integers.
    Calls go to one of them by `execution`. `about` is what `ssmc.json` holds, `report` one record a
    pass; `tokenizer` is None where the model has none.

    The tensors of `artefact` are moved to `device` (None: stay where they are), and all graphs
    share them. `backend` is a name of ssmc.lowering.BACKENDS, or `auto`: cpu, and on a CUDA
    device triton, or reference where that is not installed.
    """

    def __init__(
        self, artefact: Artefact, backend: str = "auto", device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.artefact = artefact
        artefact.graph.facts.clear()  # what passes left for one another, weights in float among it
        if device is not None:
            move(artefact.graph, find_device(str(device)))
        self.device = artefact.graph.runs_on
        self.backend = choose_backend(backend, self.device)
        self.execution: Execution = "lowered"
        self.tokenizer = Tokenizer.from_str(artefact.tokenizer) if artefact.tokenizer else None
        self.lowered: Lowered = lower(artefact.graph, self.backend)
        self._forms: dict[Form, Lowered] = {}
        self._idle: dict[tuple[Execution, int], Session] = {}

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

    def form(self, form: Form) -> Lowered:
        """The graph lowered for calls of a form, made when it is first asked for.

        `sequence` gives the logits of every position, `last` those of the last one; `step` takes
        one token and may overwrite the states it is given.
        """
        if form == "sequence":
            return self.lowered
        if form not in self._forms:
            self._forms[form] = lower(self.graph, self.backend, form)
        return self._forms[form]

    def forward(
        self,
        *inputs: torch.Tensor,
        states: States | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[Any, States]:
        """The result and the new states; for a language model logits [batch, length, vocabulary].

        States start fresh where none are given; those given stay as they are. Those of simulated
        and lowered execution have different dtypes and do not mix. Inputs may be on any device.

        `attention_mask` [batch, length] is 0 where a row of token ids is padded, at either end:
        padding is not run, logits are zero there, and a row gives what it gives alone. Raises
        UsageError for a mask with holes, and for padding behind states that are given.
        """
        program = self.lowered.graph if self.execution == "lowered" else self.graph
        spans = None if attention_mask is None else real_tokens(attention_mask, inputs[0])
        with running_on(self.device):
            given = [x.to(self.device) for x in inputs]
            if spans is None:
                return program(*given, states=states)
            if states is not None or len(given) > 1:
                raise UsageError(
                    "padding goes with token ids of fresh sequences",
                    hint="leave attention_mask out where states are given",
                )
            return run_padded(program, given[0], spans, program.states)

    def session(self, batch: int = 1, *, prefill_piece: int = LARGEST_PIECE) -> Session:
        """`batch` fresh sequences that grow token by token, as fast as the backend can.

        Prompts run in pieces of at most `prefill_piece` tokens, a power of two.
        """
        lowered = self.execution == "lowered"
        return Session(
            (lambda form: self.form(form).graph) if lowered else (lambda form: self.graph),
            batch,
            self.device,
            recorder=self._recorder() if lowered else None,
            prefill_piece=prefill_piece,
        )

    def _recorder(self) -> type[Recorder] | type[TapeRecorder] | None:
        """What records the backend's calls, if they can be."""
        if not self.lowered.backend.can_record(self.device):
            return None
        return Recorder if self.device.type == "cuda" else TapeRecorder

    @contextlib.contextmanager
    def lend_session(self, batch: int) -> Iterator[Session]:
        """A fresh session of `batch` sequences, for as long as the context lasts.

        The last one is kept for the next of as many sequences, which has nothing to record anew.
        """
        key = (self.execution, batch)
        kept = self._idle.pop(key, None)
        self._idle.clear()  # one of another batch makes room before there is a new one
        session = kept or self.session(batch)
        session.reset()
        try:
            yield session
        finally:
            self._idle = {key: session}

    def generate(
        self, input_ids: torch.Tensor, max_new_tokens: int | None = None, **arguments: Any
    ) -> torch.Tensor:
        """`input_ids` [batch, length] with up to `max_new_tokens` (64) tokens behind.

        Further arguments are those of transformers, from `do_sample` to `stop_strings`:
        `ssmc.runtime.arguments.generate` has them all. A sequence ends with the model's own
        end-of-text token where no `eos_token_id` is given; the tokenizer is its own, too.
        """
        own = {"eos_token_id": self.eos, "tokenizer": self.tokenizer}
        given = {name: value for name, value in arguments.items() if value is not None}
        return generate(self, input_ids, max_new_tokens, **(own | given))

    def weight_bytes(self) -> int:
        """Bytes of all tensors of the graphs, simulated and lowered; a shared one counts once."""
        graphs = [self.graph, self.lowered.graph, *(made.graph for made in self._forms.values())]
        storages = [t.untyped_storage() for g in graphs for t in g.params().values()]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def size(self, out: str | Path) -> dict[str, Any]:
        """Bytes of the artefact in `out`, and its tensors' share of the 16-bit model's."""
        files = {p.name: p.stat().st_size for p in sorted(Path(out).iterdir())}
        before = self.about["source"].get("float_bytes")
        ratio = files[TENSORS] / before if before else None
        return files | {"float_bytes": before, "ratio": ratio}

    def save(self, out: str | Path, *, force: bool = False) -> Path:
        """Write the artefact to the folder `out`, whole or not at all."""
        return write_artefact(self.artefact, out, force=force)


def load(path: str | Path, backend: str = "auto", device: str = "auto") -> CompiledModel:
    """The artefact in the folder `path`, checked, put on `device` and lowered for `backend`.

    Raises ArtefactError naming the file that is missing, truncated, altered or too new, and
    DeviceError where there is no such device.
    """
    found = find_device(device)
    return CompiledModel(read_artefact(path), backend, found)


def choose_backend(name: str, device: torch.device) -> str:
    """The name of a backend, which `auto` leaves to the device and to what is installed.

    Raises DeviceError for Triton's kernels on the CPU of a machine that could run them on its GPU,
    and for a CPU's kernels where the model is on a GPU.
    """
    if name == "auto":
        if device.type != "cuda":
            return "cpu"
        return "triton" if importlib.util.find_spec("triton") is not None else "reference"
    if (name, device.type) == ("cpu", "cuda"):
        raise DeviceError(
            "the cpu backend runs on the CPU, and the model is on a GPU",
            hint="use --device cpu, or --backend triton",
        )
    interpreted = bool(os.environ.get("TRITON_INTERPRET"))
    if (name, device.type) == ("triton", "cpu") and torch.cuda.is_available() and not interpreted:
        raise DeviceError(
            "the triton backend runs on a CUDA device, and the model is on the CPU",
            hint="use --device cuda, or --backend cpu",
        )
    return name
