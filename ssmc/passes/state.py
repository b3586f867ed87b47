"""Keep the state of the scans in 16 bits between calls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ssmc.core import Context, Graph, Pass, is_call, register
from ssmc.core.dialect import operands
from ssmc.passes.ssm_sites import SCANS

DTYPE = torch.bfloat16


@register
@dataclass(frozen=True)
class State(Pass):
    """Round the state of every scan to bfloat16 at the end of a call.

    Replaces:  y, state' = scan(..., state)
    With:      y, s = scan(..., float32(state));  state' = bfloat16(s)

    The recurrence inside a call stays in float32. In decoding, where a call is one token, a batch
    of sequences moves little else than its states: half the bytes are almost half the time. Models
    that run in 16 bits hold their states like this.
    """

    name = "state"
    stage = "quantise"
    exact_to = None
    beside_scheme = True

    def run(self, g: Graph, context: Context) -> None:
        """Cast each scan's state where it comes in and where it leaves."""
        names = [spec.name for spec in g.states]
        for scan in [n for n in g.nodes if is_call(n, *SCANS)]:
            state = operands(scan)["state"]
            if not isinstance(state, fx.Node) or state.name not in names:
                g.skip(scan, "its state is not one of the model's")
                continue
            self._narrow(g, scan, state, g.new_states[names.index(state.name)])
            g.match(scan)

    def _narrow(self, g: Graph, scan: fx.Node, state: fx.Node, new_state: fx.Node) -> None:
        g.set_state_dtype(state, DTYPE)
        with g.before(scan):
            wide = g.call("to_dtype", state, torch.float32, like=state, suffix="wide")
        scan.replace_input_with(state, wide)
        with g.after(new_state):
            narrow = g.call("to_dtype", new_state, DTYPE, like=new_state)
        g.replace(new_state, narrow)
        # What leaves the graph keeps its name.
        new_state.name, narrow.name = f"{new_state.name}_wide", new_state.name
