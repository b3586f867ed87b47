"""Keep the state of the scans in 16, 8, 6 or 4 bits between calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from ssmc.core import Context, Graph, Pass, is_call, register
from ssmc.core.dialect import operands
from ssmc.errors import UsageError
from ssmc.ops import quantize_state
from ssmc.passes.ssm_sites import SCANS
from ssmc.quant.state import Scales, is_packed

DTYPE = torch.bfloat16


@register
@dataclass(frozen=True)
class State(Pass):
    """Hold the state of every scan in fewer bits from one call to the next.

    Replaces:  y, state' = scan(..., state)
    With:      y, h = scan(..., dequantize_state(q, scale));  q', scale' = quantize_state(h)

    The recurrence inside a call stays in float32, and what leaves it is rounded: in decoding
    and with `ssmc eval --mode recurrent` after every token, in prefill after the prompt. The
    integers and scales are the states of the graph, so a session allocates nothing else. A batch
    of sequences moves little but its states in decoding: in bfloat16 half the bytes are almost half
    the time. Integers have no kernels yet and save memory, not time.

    `bits=16` is bfloat16, as models hold them that run in 16 bits. 8, 6 and 4 bits are integers,
    6 bits in a byte each, 4 bits two in a byte; their scales, bfloat16, are computed
    from the state of each sequence whenever it is stored. `scales=tensor` takes one scale;
    `group` one for each `group` values along the state dimension; `decoupled` one for each channel
    times one for each place in the state dimension (Chen et al. 2025, 'Q-Mamba', Findings of ACL
    2025 551, decoupled scale quantisation), of a head where there are heads; `decoupled-max` takes
    the largest magnitude of a channel as its scale, so that small channels have finer steps: the
    noise of stochastic rounding is as large as a step, however small the values are.

    `rounding=stochastic` rounds up with the probability of the fraction, so that a small change,
    repeated, is not lost. Its random numbers are a hash of seed, place and a count of calls, which
    is a state as well: 4 bytes a scan. With groups of 16 it loses least at 4 bits. `feedback` adds
    what rounding took away to the state that is stored next. What was taken is kept in the same
    format, so it doubles the bytes: 4 bits with feedback cost what 8 bits cost.
    """

    name = "state"
    stage = "quantise"
    exact_to = None
    beside_scheme = True
    bits: int = 16
    scales: Scales = "decoupled"
    group: int = 32
    rounding: Literal["nearest", "stochastic"] = "nearest"
    feedback: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (16, 8, 6, 4):
            raise UsageError(f"state{{bits={self.bits}}}: bits is 16, 8, 6 or 4")
        if self.group < 1:
            raise UsageError(f"state{{group={self.group}}}: group must be at least 1")
        if self.bits == 16 and (self.feedback or self.rounding != "nearest"):
            raise UsageError("state: rounding and feedback are for states of 8 bits and fewer")

    def run(self, g: Graph, context: Context) -> None:
        """Round each scan's state where it leaves, and widen it where it comes in."""
        before = _bytes(g)
        for number, scan in enumerate(n for n in g.nodes if is_call(n, *SCANS)):
            state = operands(scan)["state"]
            reason = self._unfit(g, state)
            if reason:
                g.skip(scan, reason)
                continue
            if self.bits == 16:
                _hold_bfloat16(g, scan, state)
            else:
                self._hold_integers(g, scan, state, (context.seed + number) % 2**31)
            g.match(scan)
        if g.matched:
            g.note(f"states take {_bytes(g)} bytes a sequence, before {before}")

    def _unfit(self, g: Graph, state: fx.Node | None) -> str | None:
        if not isinstance(state, fx.Node) or state.name not in {spec.name for spec in g.states}:
            return "its state is not one of the model's"
        width = state.meta["val"].shape[-1]
        if self.bits < 16 and self.scales == "group" and width % min(self.group, width):
            return f"its state dimension {width} is no multiple of group={self.group}"
        if self.bits == 4 and not is_packed(self.bits, width):
            g.note(f"{state.name} takes a byte a value: its state dimension {width} is odd")
        return None

    def _hold_integers(self, g: Graph, scan: fx.Node, state: fx.Node, seed: int) -> None:
        whole, new = state.meta["val"], _next(g, state)
        form = (self.bits, self.scales, min(self.group, whole.shape[-1]))
        noise = (_count_calls(g, state), seed) if self.rounding == "stochastic" else ()
        held = _Held(g, state, form)
        scan.replace_input_with(state, held.before())
        if not self.feedback:
            held.store(new, *noise)
            return
        error = _Held(g, g.add_state(f"{state.name}_error", whole, state), form)
        fed = _behind(g, new, "add", new, error.before())
        kept = held.store(fed, *noise)
        error.store(_behind(g, kept, "sub", fed, kept))


class _Held:
    """A float32 value that is carried from call to call as integers and scales.

    `state` is the placeholder that holds it as it is, in float32.
    """

    def __init__(self, g: Graph, state: fx.Node, form: tuple[int, Scales, int]) -> None:
        self.g, self.state, self.form = g, state, form
        q, scale = quantize_state(state.meta["val"], *form)
        g.set_state(state, q)
        self.scale = g.add_state(f"{state.name}_scale", scale, state)

    def before(self) -> fx.Node:
        """What it was after the call before."""
        with self.g.after(self.scale):
            return self._wide(self.state, self.scale, "wide")

    def store(self, new: fx.Node, *noise: fx.Node | int) -> fx.Node:
        """Let `new` be carried; what of it arrives in the next call."""
        pair = _behind(self.g, new, "ssmc::quantize_state", new, *self.form, *noise, suffix="pair")
        scale = _behind(self.g, pair, "getitem", pair, 1, like=self.scale, suffix="next")
        q = _behind(self.g, pair, "getitem", pair, 0, like=self.state, suffix="next")
        _carry(self.g, self.state, q)
        self.g.carry(self.scale, scale)
        with self.g.after(scale):
            return self._wide(q, scale, "kept")

    def _wide(self, q: fx.Node, scale: fx.Node, suffix: str) -> fx.Node:
        args = (q, scale, self.form[1])
        return self.g.call("ssmc::dequantize_state", *args, like=q, suffix=suffix)


def _hold_bfloat16(g: Graph, scan: fx.Node, state: fx.Node) -> None:
    g.set_state(state, state.meta["val"].to(DTYPE))
    with g.after(state):
        wide = g.call("to_dtype", state, torch.float32, like=state, suffix="wide")
    scan.replace_input_with(state, wide)
    new = _next(g, state)
    _carry(g, state, _behind(g, new, "to_dtype", new, DTYPE))


def _count_calls(g: Graph, state: fx.Node) -> fx.Node:
    """A state that counts the calls, int32 [B, 1]."""
    zero = torch.empty((len(state.meta["val"]), 1), dtype=torch.int32, device="meta")
    count = g.add_state(f"{state.name}_count", zero, state)
    g.carry(count, _behind(g, count, "add", count, 1, suffix="next"))
    return count


def _next(g: Graph, state: fx.Node) -> fx.Node:
    return g.new_states[[spec.name for spec in g.states].index(state.name)]


def _carry(g: Graph, state: fx.Node, new: fx.Node) -> None:
    """Carry `new`, under the name of what `state` was after a call until now."""
    old = _next(g, state)
    g.carry(state, new)
    if old is not state:
        old.name, new.name = f"{old.name}_wide", old.name


def _behind(
    g: Graph, node: fx.Node, name: str, *args: Any, like: fx.Node | None = None, suffix: str = ""
) -> fx.Node:
    with g.after(node):
        return g.call(name, *args, like=like or node, suffix=suffix)


def _bytes(g: Graph) -> int:
    """Bytes that the states of a sequence take."""
    return sum(spec.zeros(1, "meta").nbytes for spec in g.states)
