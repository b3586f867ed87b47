"""Train what selects, block by block, to make up for states that are rounded at every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ssmc.core import Context, Graph, Pass, is_call, register
from ssmc.core.dialect import operands
from ssmc.core.saved import Saved
from ssmc.errors import UsageError
from ssmc.passes._blocks import Block, Call, Stream, blocks, plain
from ssmc.passes._fit import Fit, Schedule
from ssmc.passes._selective import selective_params
from ssmc.passes._simulated_scan import simulated_scan
from ssmc.passes.ssm_sites import SCANS
from ssmc.quant.state import Scales, round_state_tensor, uniform_noise


@register
@dataclass(frozen=True)
class Reconstruct(Pass):
    """Fit each block with rounded states to the block in float, through its selective parameters.

    Replaces:  the weights that give B, C and dt, and those of convolution and norms
    With:      weights that were trained on calibration text, so that the block's output, its scan
               rounding the state after every token, is near to the output in float

    Efficient selectivity reconstruction (Chen et al. 2025, 'Q-Mamba', Findings of ACL 2025 551):
    what is trained is as little as that, x and z stay. Its objective, parameters and schedule are
    ours, as is the scan: rounding counts as the identity in gradients, so the backward pass is one
    linear recurrence around the rounded states. Blocks are taken in order; each gets as its input
    what the trained blocks before it give with rounded states. `bits`, `scales`, `group` and
    `rounding` are those of the pass `state` that is to follow.

    The first `length` tokens of `windows` calibration windows are used; a quarter of them is held
    back, and the parameters stay as they were best on these, or as they are if nothing helped.
    Adam (Kingma and Ba 2015) takes `steps` steps a block of `batch` windows with learning rate
    `lr`, falling to zero; it looks at those held back eight times, and ends after `patience` looks
    without a gain. Draws follow the recipe's seed. Memory is bounded by one block's states for
    `batch` windows, and by the values between two blocks for all windows. Several processes share
    the windows of a step, whose gradients are added in their order, and those held back.
    """

    name = "reconstruct"
    stage = "reconstruct"
    needs = ("ssm-sites", "fold-a-log")
    exact_to = None
    bits: int = 4
    scales: Scales = "decoupled"
    group: int = 32
    rounding: Literal["nearest", "stochastic"] = "nearest"
    steps: int = 40
    lr: float = 3e-4
    batch: int = 2
    windows: int = 32
    length: int = 128
    patience: int = 3

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "patience", "group"):
            if getattr(self, name) < 1:
                raise UsageError(f"reconstruct{{{name}={getattr(self, name)}}}: at least 1")
        if self.bits not in (8, 6, 4) or min(self.length, self.windows) < 2 or not self.lr > 0:
            raise UsageError(
                f"{self} is out of range",
                hint="bits is 8, 6 or 4, length and windows at least 2, lr above 0",
            )

    def run(self, g: Graph, context: Context) -> None:
        """Walk through the blocks, the model in float beside the one that is trained."""
        windows = self._windows(context)
        exact, rounded = (Stream(g, windows, self.batch, context.ranks) for _ in range(2))
        order, draw = blocks(g), torch.Generator().manual_seed(context.seed)
        done = _restore(context.log.restore(g), exact, rounded, draw)
        for number, block in enumerate(order[done:], done):
            params = _there(g, block, context.device)
            exact.advance(block, params)
            masks = self._masks(g, block, context.device)
            if masks:
                fit = Fit(block, params, masks, rounded, exact, self._call, context.ranks)
                self._fit(g, fit, draw, self._progress(context, number, len(order)))
                params = _there(g, block, context.device)
            rounded.advance(block, params, self._call(0))
            for stream in (exact, rounded):
                stream.forget({node for later in order[number + 1 :] for node in later.calls})
            if context.log.due():
                context.log.save(g, _saved(number + 1, exact, rounded, draw))

    def _windows(self, context: Context) -> list[Tensor]:
        """The model's inputs, [windows, length, ...] each."""
        batches = list(context.batches())
        length = min(self.length, *(x.shape[1] for batch in batches for x in batch))
        inputs = zip(*batches, strict=True)
        windows = [torch.cat([x[:, :length] for x in parts])[: self.windows] for parts in inputs]
        if len(windows[0]) < 2:
            raise UsageError(
                "reconstruct needs two windows of calibration text, one to hold back",
                hint="raise --samples",
            )
        return windows

    def _masks(self, g: Graph, block: Block, device: torch.device) -> dict[str, Tensor]:
        """The parameters of a block that are trained, and where."""
        sites = [s for s in g.facts["ssm-sites"] if s.scan in block.scans and is_kept(s.scan)]
        found = selective_params(g, block.calls, sites)
        if block.scans and not (sites and found):
            g.skip(block.scans[0], "it keeps no state, or no parameter is its own")
        return {str(n.target): mask.to(device) for n, mask in found.items()} if sites else {}

    def _fit(
        self, g: Graph, fit: Fit, draw: torch.Generator, progress: Callable[[int], None]
    ) -> None:
        scan = fit.block.scans[0]
        schedule = Schedule(self.steps, self.lr, self.batch, self.patience)
        best, before, after = fit.run(schedule, draw, progress)
        if not after < before:
            g.skip(scan, f"no step helped; error {before:.2e} on windows held back")
            return
        for node in g.nodes:
            if node.op == "get_attr" and node.target in best:
                g.set_param(node, best[str(node.target)])
        g.match(scan)
        g.note(f"{scan.name}: error {before:.2e} -> {after:.2e} on windows held back")

    def _progress(self, context: Context, block: int, blocks: int) -> Callable[[int], None]:
        return lambda done: context.progress(block * self.steps + done, blocks * self.steps)

    def _call(self, number: int) -> Call:
        """How calls are computed in step `number`: plainly, but scans round their states."""

        def store(h: Tensor, t: int) -> Tensor:
            noise = None
            if self.rounding == "stochastic":
                noise = uniform_noise(torch.full((len(h), 1), t, device=h.device), h.shape, number)
            return round_state_tensor(
                h, self.bits, self.scales, min(self.group, h.shape[-1]), noise
            )

        def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            kept = is_call(node, *SCANS) and is_kept(node)
            return simulated_scan(node, args, store) if kept else plain(node, args, kwargs)

        return call


def _there(g: Graph, block: Block, device: torch.device) -> dict[str, Tensor]:
    """The parameters that a block reads, on a device."""
    read = {n for call in block.calls for n in call.all_input_nodes if n.op == "get_attr"}
    return {str(node.target): g.param(node).to(device) for node in read}


def _saved(done: int, exact: Stream, rounded: Stream, draw: torch.Generator) -> Saved:
    """How many blocks are done, and what those to come begin with."""
    tensors = {"draw": draw.get_state()}
    for name, stream in (("exact", exact), ("rounded", rounded)):
        tensors |= {f"{name} {node.name}": value for node, value in stream.values.items()}
    return Saved({"done": done}, tensors)


def _restore(saved: Saved | None, exact: Stream, rounded: Stream, draw: torch.Generator) -> int:
    """Begin with that, and say how many blocks are done."""
    if saved is None:
        return 0
    draw.set_state(saved.tensors["draw"])
    for name, stream in (("exact", exact), ("rounded", rounded)):
        found = {
            key.partition(" ")[2]: t
            for key, t in saved.tensors.items()
            if key.startswith(f"{name} ")
        }
        device = stream.device
        stream.values = {stream.g.node(key): value.to(device) for key, value in found.items()}
    return int(saved.about["done"])


def is_kept(scan: fx.Node) -> bool:
    """Whether a scan goes on, forwards, from a state that the model is given."""
    args = operands(scan)
    return getattr(args["state"], "op", None) == "placeholder" and not args["reverse"]
