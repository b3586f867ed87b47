"""Fused operators on int8 operands, which lowering makes from dequantise, operator pairs.

Each is bit for bit the composition of `dequantize` and the `exact` float operator: the products
of integers are summed exactly, scaled in float64 and rounded once to float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmc.errors import UsageError
from ssmc.ops.conv import activate, check_conv, conv_fake, slide, with_history
from ssmc.ops.linear import check_linear, linear_fake
from ssmc.ops.registry import operator
from ssmc.ops.selective_scan import scan_fake, selective_scan
from ssmc.ops.ssd_scan import ssd_fake, ssd_scan
from ssmc.quant.formats import dequantize_tensor
from ssmc.quant.weights import dequantize_packed


def _rescale(accumulator: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """float32(accumulator * (x_scale * w_scale)) + bias; w_scale [] or [N, 1] for [..., N]."""
    scale = x_scale.double() * w_scale.double().reshape(-1)
    y = (accumulator.double() * scale).float()
    return y if bias is None else y + bias


def _linear_fake(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    return linear_fake("int8_linear", x_q, _unpacked_shape(w_q), bias)


def _unpacked_shape(w_q: Tensor) -> Tensor:
    """w_q, or where it is packed a tensor without values of the weight's shape [N, K]."""
    if w_q.dtype != torch.uint8:
        return w_q
    return w_q.new_empty((w_q.shape[0], 2 * w_q.shape[1]), device="meta")


@operator(_linear_fake)
def int8_linear(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`linear` of int8 x_q [..., K] and w_q [N, K]; returns float32 [..., N].

    x_scale [] or [..., 1], w_scale [] or [N, 1], bias [N] float32. Or w_q of packed groups of 4
    bits, uint8 [N, K / 2] with w_scale [N, K / group].
    """
    check_linear("int8_linear", x_q, _unpacked_shape(w_q), bias)
    if w_q.dtype == torch.uint8:
        weight = dequantize_packed(w_q, w_scale)
        y = (x_q.double() @ weight.double().T * x_scale.double()).float()
        return y if bias is None else y + bias
    # float64 holds any sum of int8 products exactly, and unlike int32 has a fast product.
    return _rescale(x_q.double() @ w_q.double().T, x_scale, w_scale, bias)


def _embedding_fake(ids: Tensor, w_q: Tensor, w_scale: Tensor) -> Tensor:
    return w_scale.new_empty((*ids.shape, w_q.shape[1]))


@operator(_embedding_fake)
def int8_embedding(ids: Tensor, w_q: Tensor, w_scale: Tensor) -> Tensor:
    """`embedding` of int8 rows w_q [V, D] with w_scale [] or [V, 1]; float32 [B, L, D]."""
    scale = w_scale if w_scale.dim() == 0 else F.embedding(ids, w_scale)
    return dequantize_tensor(w_q[ids], scale)


def _conv_fake(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    state_q: Tensor | None = None,
    *_: object,
) -> tuple[Tensor, Tensor]:
    return conv_fake("int8_causal_conv1d", x_q, w_q, bias, state_q)


@operator(_conv_fake)
def int8_causal_conv1d(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    state_q: Tensor | None = None,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d` of int8 x_q [B, L, C] and w_q [C, K]; returns float32 y, int8 state.

    x_scale [] or [C], w_scale [] or [C, 1]. state_q [B, K-1, C] has the scale of x_q.
    """
    check_conv("int8_causal_conv1d", x_q, w_q, bias, state_q)
    padded = with_history(x_q, w_q.shape[1], state_q)
    accumulator = slide(padded.int(), w_q.int())
    y = activate(_rescale(accumulator, x_scale, w_scale, bias), activation)
    return y, padded[:, x_q.shape[1] :].clone()


@operator(lambda u_q, u_scale, dt_q, dt_scale, A, *_: scan_fake(u_q, A))
def int8_selective_scan(
    u_q: Tensor,
    u_scale: Tensor,
    dt_q: Tensor,
    dt_scale: Tensor,
    A: Tensor,
    B_q: Tensor,
    B_scale: Tensor,
    C_q: Tensor,
    C_scale: Tensor,
    D: Tensor | None = None,
    z_q: Tensor | None = None,
    z_scale: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state: Tensor | None = None,
    softplus: bool = True,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` of int8 u, dt, B, C and z; A, D, dt_bias and the state are float32.

    A scale is [] or broadcasts against its operand: [D] a channel, [B, L, 1] a token. z_q and
    z_scale come together, or UsageError.
    """
    if (z_q is None) != (z_scale is None):
        raise UsageError("ssmc::int8_selective_scan: z_q and z_scale come together or not at all")
    z = None if z_q is None or z_scale is None else dequantize_tensor(z_q, z_scale)
    u, dt = dequantize_tensor(u_q, u_scale), dequantize_tensor(dt_q, dt_scale)
    B, C = dequantize_tensor(B_q, B_scale), dequantize_tensor(C_q, C_scale)
    return selective_scan(u, dt, A, B, C, D, z, dt_bias, state, softplus, reverse)


@operator(lambda x_q, x_scale, dt_q, dt_scale, A, B_q, *_: ssd_fake(x_q, A, B_q))
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
) -> tuple[Tensor, Tensor]:
    """`ssd_scan` of int8 x, dt, B and C; A, D, dt_bias and the state are float32.

    A scale is [] or broadcasts against its operand: [H, P] for the channels of x, [G, N] for
    those of B and C, or a size of one in every channel dimension for a scale a token.
    """
    x, dt = dequantize_tensor(x_q, x_scale), dequantize_tensor(dt_q, dt_scale)
    B, C = dequantize_tensor(B_q, B_scale), dequantize_tensor(C_q, C_scale)
    return ssd_scan(x, dt, A, B, C, D, dt_bias, state, dt_min, dt_max, reverse)
