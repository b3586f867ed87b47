"""The scan of Mamba-2 over a prompt whose state is held in 16 bits."""

from __future__ import annotations

import math

from torch import Tensor

from ssmc.ops.int8 import int8_ssd_scan
from ssmc.ops.registry import composite


@composite
def int8_ssd_scan_state(
    x_q: Tensor,
    x_scale: Tensor,
    dt_q: Tensor,
    dt_scale: Tensor,
    A: Tensor,
    B_q: Tensor,
    B_scale: Tensor,
    C_q: Tensor,
    C_scale: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """`int8_ssd_scan` from a state of any type of floats, which is widened, to one of that type."""
    operands = (x_q, x_scale, dt_q, dt_scale, A, B_q, B_scale, C_q, C_scale, D, dt_bias)
    y, new = int8_ssd_scan(*operands, state.float(), dt_min, dt_max, reverse)
    return y, new.to(state.dtype)
