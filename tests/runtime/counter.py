"""A program of three lines, for what is to be seen of sessions alone."""

from __future__ import annotations

import torch

from ssmc.core import States, StateSpec
from ssmc.lowering import Form


class Counter:
    """Adds up ids: its step writes one state in place and returns the other in a new buffer."""

    def __init__(self, form: Form, fails: bool = False) -> None:
        self.form, self.fails, self.calls = form, fails, 0
        self.states = (StateSpec("sum", (1,)), StateSpec("last", (1,), torch.int8))

    def run(self, ids: torch.Tensor, states: States) -> tuple[torch.Tensor, States]:
        self.calls += 1
        if self.fails:
            ids.sum().item()
        total = ids.sum(1, keepdim=True)
        added = states["sum"].add_(total) if self.form == "step" else states["sum"] + total
        logits = torch.cat([added, states["last"].float()], 1)[:, None]
        return logits, {"sum": added, "last": ids[:, -1:].to(torch.int8)}
