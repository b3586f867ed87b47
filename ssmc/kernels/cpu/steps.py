"""What decoding runs for one position: kernels in a row, which write new states over the old."""

from __future__ import annotations

import math

from torch import Tensor

from ssmc.kernels.cpu.conv1d import convolve
from ssmc.kernels.cpu.launch import narrowed, widened
from ssmc.kernels.cpu.linear import int8_linear, int8_linear_quantize
from ssmc.kernels.cpu.norm import rms_norm_quantize
from ssmc.kernels.cpu.quantize import quantize_dynamic
from ssmc.kernels.cpu.ssd_scan import scan as ssd_scan


def norm_linear_step(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """As ssmc::norm_linear_step."""
    return int8_linear(*rms_norm_quantize(x, norm_weight, eps), w_q, w_scale, bias)


def in_proj_conv_step(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
    conv_start: int,
    conv_w_q: Tensor,
    conv_w_scale: Tensor,
    conv_bias: Tensor | None,
    state_q: Tensor,
    activation: str,
    u_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ssmc::in_proj_conv_step; the new state is written over `state_q`."""
    q = int8_linear_quantize(*rms_norm_quantize(x, norm_weight, eps), w_q, w_scale, bias, out_scale)
    part = slice(conv_start, conv_start + conv_w_q.shape[0])
    given = (q[..., part], out_scale[part], conv_w_q, conv_w_scale, conv_bias, state_q, activation)
    return q, *convolve(*given, u_scale.reshape(-1), state_q)


def ssd_scan_step(
    x_q: Tensor,
    x_scale: Tensor,
    dt_q: Tensor,
    dt_scale: Tensor,
    A: Tensor,
    BC: Tensor,
    groups: int,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """As ssmc::ssd_scan_step; the new state is written over `state` where that is float32."""
    B, C = (part.unflatten(-1, (groups, -1)) for part in BC.chunk(2, -1))
    wide = widened(state)
    operands = (x_q, x_scale, dt_q, dt_scale, A, *quantize_dynamic(B), *quantize_dynamic(C))
    y, new = ssd_scan(*operands, D, dt_bias, wide, dt_min, dt_max, False, wide)
    return y, narrowed(new, state)


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
    """As ssmc::int8_ssd_scan_state."""
    operands = (x_q, x_scale, dt_q, dt_scale, A, B_q, B_scale, C_q, C_scale, D, dt_bias)
    y, new = ssd_scan(*operands, widened(state), dt_min, dt_max, reverse, None)
    return y, narrowed(new, state)
