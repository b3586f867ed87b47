"""TARGET: a model or an artefact, opened the same way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmc.cli.output import note

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from ssmc.runtime import CompiledModel, Session


def check_choice(option: str, value: str, known: tuple[str, ...]) -> None:
    """Raise UsageError unless the value of an option is a known one."""
    from ssmc.errors import UsageError, choices

    if value not in known:
        raise UsageError(f"--{option} {value} is unknown", hint=choices(value, known))


@dataclass
class Target:
    """Something that runs: `run(ids, states=...)` gives logits and states."""

    name: str
    run: Any
    tokenizer: Tokenizer | None
    eos: int | None
    device: torch.device
    compiled: CompiledModel | None = None
    chat: dict[str, Any] | None = None
    fingerprint: str | None = None  # of a float model

    def encoder(self) -> tuple[Tokenizer, int]:
        """The tokenizer and the token that separates texts; UsageError where it has none."""
        from ssmc.errors import UsageError

        if self.tokenizer is None or self.eos is None:
            raise UsageError(
                f"{self.name} has no tokenizer",
                hint="put tokenizer.json into the folder of the model (and compile it again)",
            )
        return self.tokenizer, self.eos

    def encode(self, prompt: str, what: str = "the prompt") -> torch.Tensor:
        """The tokens [length] of a prompt; UsageError, which calls it `what`, where it has none."""
        import torch

        from ssmc.corpus import is_text
        from ssmc.errors import UsageError

        if not is_text(prompt):
            raise UsageError(f"{what} is not UTF-8 text", hint="check how it is encoded")
        ids = self.encoder()[0].encode(prompt, add_special_tokens=False).ids
        if not ids:
            raise UsageError(f"{what} is empty", hint="give some text to go on from")
        return torch.tensor(ids, dtype=torch.int64, device=self.device)

    def session(self) -> Session:
        """One fresh sequence."""
        from ssmc.runtime import Session

        if self.compiled is not None:
            return self.compiled.session()
        return Session(lambda form: self.run, 1, self.device)

    def windows(self, text: Path, length: int, limit: int | None) -> torch.Tensor:
        """Windows of tokens [n, length] of a text file, on the device of what runs."""
        from ssmc.corpus import read_texts, token_windows

        tokenizer, eos = self.encoder()
        windows = token_windows(tokenizer, read_texts(text), eos, length, str(text))[:limit]
        return windows.to(self.device)

    def overlap(self, windows: torch.Tensor) -> float | None:
        """The share of windows' runs that an artefact was calibrated on; None where not known."""
        from ssmc.overlap import from_text, run_hashes, shared

        about = self.compiled.about.get("calibration", {}) if self.compiled is not None else {}
        if "runs" not in about:
            return None
        return shared(run_hashes(windows), from_text(about["runs"]))


def choose_execution(target: Target, execution: str) -> None:
    """Have an artefact run `lowered` or `simulated`; UsageError for another word."""
    check_choice("execution", execution, ("lowered", "simulated"))
    if target.compiled is not None:
        target.compiled.execution = execution  # type: ignore[assignment]


def open_target(name: str, backend: str = "auto", device: str = "auto") -> Target:
    """The model or artefact called `name`, on a device; `backend` is what an artefact runs on."""
    from ssmc.errors import UsageError
    from ssmc.native.model import is_program
    from ssmc.runtime import is_artefact, load
    from ssmc.runtime.artefact import GRAPH

    if is_program(name):
        raise UsageError(
            f"{name} is a native program, no model or artefact",
            hint=f"ssmc run {name} --prompt TEXT",
        )
    if (Path(name) / GRAPH).is_file() or is_artefact(name):
        compiled = load(name, backend, device)
        run_on, chat = compiled.device, compiled.about.get("chat")
        return Target(name, compiled, compiled.tokenizer, compiled.eos, run_on, compiled, chat)
    return open_model(name, device)


def open_model(name: str, device: str = "auto") -> Target:
    """The float model called `name`, traced, on a device."""
    from ssmc.device import find_device, move
    from ssmc.frontend import load_model, trace
    from ssmc.runtime.template import read_chat_template

    found = find_device(device)
    note(f"loading {name}")
    model = load_model(name)
    graph = trace(model.module)
    move(graph, found)
    chat, mark = read_chat_template(model.folder), model.fingerprint
    return Target(name, graph, model.tokenizer, model.eos_token_id, found, None, chat, mark)
