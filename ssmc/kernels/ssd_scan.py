"""`int8_ssd_scan`: the scan of Mamba-2 over a prompt."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor

from ssmc.kernels import ssd_chunks, ssd_segments

Strategy = Literal["chunks", "segments"]


def int8_ssd_scan(
    x_q: Tensor,
    x_scale: Tensor,
    dt_q: Tensor,
    dt_scale: Tensor,
    A: Tensor,
    B_q: Tensor,
    B_scale: Tensor,
    C_q: Tensor,
    C_scale: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state: Tensor | None = None,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    reverse: bool = False,
    *,
    strategy: Strategy = "chunks",
    **how: Any,
) -> tuple[Tensor, Tensor]:
    """`ssmc.ops.int8_ssd_scan`, all chunks side by side or segments of them; see either module."""
    run = {"chunks": ssd_chunks, "segments": ssd_segments}[strategy].int8_ssd_scan
    operands = (x_q, x_scale, dt_q, dt_scale, A, B_q, B_scale, C_q, C_scale)
    return run(*operands, D, dt_bias, state, dt_min, dt_max, reverse, **how)
