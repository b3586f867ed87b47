"""int8 causal convolution that ends in int8."""

from __future__ import annotations

from torch import Tensor

from ssmc.ops.int8 import int8_causal_conv1d
from ssmc.ops.quantize import quantize, quantize_dynamic
from ssmc.ops.registry import composite


@composite
def int8_causal_conv1d_quantize(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    state_q: Tensor | None,
    activation: str,
    out_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """`int8_causal_conv1d` rounded to int8 with a static scale a channel, out_scale [C].

    Returns (u_q int8 [B, L, C], new state int8 [B, K-1, C]).
    """
    y, new_state = int8_causal_conv1d(x_q, x_scale, w_q, w_scale, bias, state_q, activation)
    return quantize(y, out_scale), new_state


@composite
def int8_causal_conv1d_split(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    state_q: Tensor | None,
    activation: str,
    out_scale: Tensor,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`int8_causal_conv1d` whose channels are those of x, B and C of a Mamba-2 mixer.

    out_scale [H, P] is the static scale of x; B and C, each the half of the other channels in
    `groups` groups of N, get a scale a token and group. Returns (u_q int8 [B, L, H, P], B_q int8
    [B, L, G, N], B_scale [B, L, G, 1], C_q, C_scale, new state int8 [B, K-1, C]).
    """
    y, new_state = int8_causal_conv1d(x_q, x_scale, w_q, w_scale, bias, state_q, activation)
    width = (y.shape[-1] - out_scale.numel()) // 2
    x, B, C = y.split([out_scale.numel(), width, width], -1)
    u_q = quantize(x.unflatten(-1, out_scale.shape), out_scale)
    grouped = (part.unflatten(-1, (groups, -1)) for part in (B, C))
    return u_q, *quantize_dynamic(next(grouped)), *quantize_dynamic(next(grouped)), new_state
