"""`ssmc` as a model of lm-eval: `lm_eval --model ssmc --model_args target=TARGET`."""

from __future__ import annotations

from lm_eval.api.registry import register_model

from ssmc.cli import output
from ssmc.cli.target import choose_execution, open_target
from ssmc.evaluate.harness import LONGEST, HarnessModel

UNSAID = "cuda:0"
"""The device that lm-eval's command line passes where none is given, on any machine."""


@register_model("ssmc")
class TargetModel(HarnessModel):
    """A model or an artefact: `--model_args target=TARGET,execution=simulated,backend=cpu`.

    `execution` and `backend` are those of `ssmc eval`, `max_length` the tokens of a window.
    """

    def __init__(
        self,
        target: str,
        execution: str = "lowered",
        backend: str = "auto",
        device: str = "auto",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int = LONGEST,
    ) -> None:
        opened = open_target(str(target), backend, "auto" if device == UNSAID else device)
        choose_execution(opened, execution)
        tokenizer, eos = opened.encoder()
        automatic = batch_size is None or str(batch_size).startswith("auto")
        super().__init__(
            opened.run, tokenizer, eos, opened.device,
            batch=max_batch_size if automatic else int(batch_size or 1),
            longest=max_length,
            progress=lambda label: output.progress(f"{label} {target}"),
        )  # fmt: skip
