"""What a case is: an operator, its kernel, fresh inputs, and the least the kernel must do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = Callable[[torch.device], tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    `operator` is the function of `ssmc.ops` (the reference), `kernel` takes the same arguments,
    `inputs` makes fresh random ones on a device. `bytes` counts each input read once and each
    output written once; `operations` what the fastest unit must do, in `unit` ('int8', 'bf16',
    'tf32', 'fp32' or 'exp'). `error` is the relative error allowed of float results, `flips` the
    share of int8 results that may differ by one. `configs` are launch parameters to try, each
    passed to the kernel as keywords.
    """

    name: str
    operator: Callable[..., Any]
    kernel: Callable[..., Any]
    inputs: Inputs
    bytes: float
    operations: float = 0.0
    unit: str = "int8"
    error: float = 1e-5
    flips: float = 0.0
    configs: tuple[dict[str, Any], ...] = field(default=())
