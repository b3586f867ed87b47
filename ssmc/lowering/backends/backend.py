"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ssmc.lowering.rewriter import Rules

Kernels = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class Tolerance:
    """How far a kernel's results may be from the operator's definition.

    `error`: the relative error of a float result. `flips`: the share of its integers that may
    differ, by one; a value that lies between two of them is rounded to either where floats that
    lead to it were summed in another order.
    """

    error: float = 0.0
    flips: float = 0.0


EXACT = Tolerance()
DEFAULTS = {"ssmc::int4_linear": Tolerance(error=1e-5)}  # simulated, it sums floats in float32


@dataclass(frozen=True)
class Backend:
    """A name, kernels by operator name, and the rules that make the operators it has them for.

    What has no kernel runs the operator's reference; `complete` says that the backend means to have
    one for everything. `rules` and, for decoding, `step_rules` are lists of rules that are applied
    one after the other to the graph of int8 operators. `tolerances` hold by operator, those of
    `int4_tolerances` first where its weight has 4 bits; the bits of the reference where nothing is
    listed.
    """

    name: str
    kernels: Kernels = field(default_factory=dict)
    rules: tuple[Rules, ...] = ()
    step_rules: tuple[Rules, ...] = ()
    tolerances: Mapping[str, Tolerance] = field(default_factory=dict)
    int4_tolerances: Mapping[str, Tolerance] = field(default_factory=dict)
    complete: bool = False

    def load(self) -> Kernels:
        """The kernels, ready to run; DeviceError where they cannot run on this machine."""
        return self.kernels

    def can_record(self, device: torch.device) -> bool:
        """Whether calls on `device` can be recorded, to be replayed without Python."""
        return False

    def tolerance(self, operator: str, int4: bool = False) -> Tolerance:
        """What `ssmc verify` allows the kernel of `operator`, with weights of 4 bits if `int4`."""
        stated = DEFAULTS | dict(self.tolerances) | dict(self.int4_tolerances if int4 else {})
        return stated.get(operator, EXACT)
