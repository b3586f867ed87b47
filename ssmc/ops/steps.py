"""What decoding runs for one position: each operator is all that one kernel does.

All take tensors of length 1 and sequences of any number. As defined here they leave the states they
are given alone and return new ones; a kernel may write the new state over the old. The state of a
scan may be held in 16 bits: it is widened, and the new one rounded.
"""

from __future__ import annotations

import math

from torch import Tensor

from ssmc.ops.attention import cache_append
from ssmc.ops.fused_linear import int8_linear_quantize
from ssmc.ops.fused_norm import rms_norm_quantize
from ssmc.ops.int8 import int8_causal_conv1d, int8_linear, int8_selective_scan, int8_ssd_scan
from ssmc.ops.quantize import quantize, quantize_dynamic
from ssmc.ops.registry import composite, operator


@composite
def norm_linear_step(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """`rms_norm_quantize`, then `int8_linear`: x [B, 1, D] to float32 [B, 1, N]."""
    return int8_linear(*rms_norm_quantize(x, norm_weight, eps), w_q, w_scale, bias)


@composite
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
    """Norm, in_proj and one step of the convolution of the channels from `conv_start` on.

    x [B, 1, D]; w_q [N, D]; out_scale [N] static; conv_w_q [C, K]; state_q int8 [B, K-1, C]. The
    first channels of the convolution, as many as u_scale has, are rounded to int8. Returns (in_proj
    rounded, int8 [B, 1, N]; u_q int8 [B, 1, U]; the other channels of the convolution float32
    [B, 1, C-U]; new state).
    """
    q = int8_linear_quantize(*rms_norm_quantize(x, norm_weight, eps), w_q, w_scale, bias, out_scale)
    part = slice(conv_start, conv_start + conv_w_q.shape[0])
    y, new_state = int8_causal_conv1d(
        q[..., part], out_scale[part], conv_w_q, conv_w_scale, conv_bias, state_q, activation
    )
    width = u_scale.numel()
    u_q = quantize(y[..., :width].contiguous(), u_scale.reshape(-1))
    return q, u_q, y[..., width:].contiguous(), new_state


@composite
def selective_scan_step(
    x_proj: Tensor,
    dt_w_q: Tensor,
    dt_w_scale: Tensor,
    dt_proj_bias: Tensor | None,
    dt_scale: Tensor,
    u_q: Tensor,
    u_scale: Tensor,
    A: Tensor,
    D: Tensor | None,
    z_q: Tensor | None,
    z_scale: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    """dt_proj, then one step of `int8_selective_scan`; x_proj float32 [B, 1, R + 2 N].

    Its segments, the low-rank dt, B and C in this order, are each quantised with a scale a token;
    dt_w_q [D, R]; dt_scale [D] or [] is the static scale of dt. Returns (y float32 [B, 1, D], new
    state [B, D, N]).
    """
    low, B, C = _segments(x_proj, A.shape[1])
    dt_q = int8_linear_quantize(*quantize_dynamic(low), dt_w_q, dt_w_scale, dt_proj_bias, dt_scale)
    operands = (u_q, u_scale, dt_q, dt_scale, A, *quantize_dynamic(B), *quantize_dynamic(C))
    y, new = int8_selective_scan(*operands, D, z_q, z_scale, dt_bias, state.float(), softplus)
    return y, new.to(state.dtype)


@composite
def normed_selective_scan_step(
    x_proj: Tensor,
    dt_norm: Tensor | None,
    B_norm: Tensor | None,
    C_norm: Tensor | None,
    eps: float,
    dt_w_q: Tensor,
    dt_w_scale: Tensor,
    dt_proj_bias: Tensor | None,
    dt_scale: Tensor,
    u_q: Tensor,
    u_scale: Tensor,
    A: Tensor,
    D: Tensor | None,
    z_q: Tensor | None,
    z_scale: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    """`selective_scan_step` whose low-rank dt, B and C each go through `rms_norm` first."""
    low, B, C = _segments(x_proj, A.shape[1])
    pair = rms_norm_quantize(low, dt_norm, eps)
    dt_q = int8_linear_quantize(*pair, dt_w_q, dt_w_scale, dt_proj_bias, dt_scale)
    pairs = (*rms_norm_quantize(B, B_norm, eps), *rms_norm_quantize(C, C_norm, eps))
    operands = (u_q, u_scale, dt_q, dt_scale, A, *pairs)
    y, new = int8_selective_scan(*operands, D, z_q, z_scale, dt_bias, state.float(), softplus)
    return y, new.to(state.dtype)


def _segments(x_proj: Tensor, rank: int) -> list[Tensor]:
    """The low-rank dt, B and C of x_proj [..., R + 2 N]."""
    return list(x_proj.split([x_proj.shape[-1] - 2 * rank, rank, rank], -1))


@composite
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
    """One step of `int8_ssd_scan`; BC float32 [B, 1, 2 G N] holds B, then C, not yet quantised.

    x_q int8 [B, 1, H, P], dt_q int8 [B, 1, H]; state [B, H, P, N]. Returns (y float32 [B, 1, H, P],
    new state).
    """
    B, C = (part.unflatten(-1, (groups, -1)) for part in BC.chunk(2, -1))
    pairs = (*quantize_dynamic(B), *quantize_dynamic(C))
    operands = (x_q, x_scale, dt_q, dt_scale, A, *pairs, D, dt_bias, state.float())
    y, new = int8_ssd_scan(*operands, dt_min, dt_max)
    return y, new.to(state.dtype)


@composite
def cache_append_step(cache: Tensor, x: Tensor, position: Tensor) -> Tensor:
    """`cache_append` of the rows of one token: cache [B, T, ...], x [B, 1, ...], position [B]."""
    return cache_append(cache, x, position)


@composite
def cache_quantize_step(
    cache: Tensor, scales: Tensor, x: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """`quantize_dynamic` of the rows of one token, then `cache_append_step` of both results.

    cache int8 [B, T, G, P], scales [B, T, G, 1] of any type of floats; x float32 [B, 1, G, P].
    """
    q, scale = quantize_dynamic(x)
    new = cache_append(cache, q, position)
    return new, cache_append(scales, scale.to(scales.dtype), position)


@operator(lambda position, tokens: position.new_empty(position.shape))
def position_step(position: Tensor, tokens: int) -> Tensor:
    """How many tokens each sequence has had, int64 [B], after so many more."""
    return position + tokens
