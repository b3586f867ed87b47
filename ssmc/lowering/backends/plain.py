"""Integer operators in plain torch, for CPUs: sums that stay exact in the fastest unit at hand.

A product of 8-bit integers is at most 2^14, so 1,024 of them add up exactly in float32, whose
matrix product every CPU does at full rate; torch's int8 product is 10 to 30 times slower where
oneDNN finds no VNNI.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmc import ops
from ssmc.lowering.backends.backend import Backend

EXACT = 1024  # 127 * 127 * 1024 < 2^24, the integers float32 holds without gaps


def int8_linear(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """As ssmc::int8_linear, bit for bit: x_q [..., K], w_q [N, K] -> float32 [..., N]."""
    if w_q.dtype == torch.uint8:  # packed, in groups of scales that do not factor out
        return ops.int8_linear(x_q, x_scale, w_q, w_scale, bias)
    scale = x_scale * w_scale.reshape(-1)  # exact: two bfloat16 factors fit into float32
    if x_q.shape[-1] <= EXACT:
        y = (x_q.float() @ w_q.float().T).mul_(scale)
    else:
        y = _long_product(x_q, w_q).mul_(scale.double()).float()
    return y if bias is None else y.add_(bias)


def _long_product(x_q: Tensor, w_q: Tensor) -> Tensor:
    total = torch.zeros((*x_q.shape[:-1], w_q.shape[0]), dtype=torch.float64, device=x_q.device)
    for x, w in zip(x_q.split(EXACT, -1), w_q.split(EXACT, -1), strict=True):
        total += x.float() @ w.float().T
    return total


def int8_causal_conv1d(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    state_q: Tensor | None = None,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """As ssmc::int8_causal_conv1d, bit for bit: x_q [B, L, C], w_q [C, K], state [B, K-1, C]."""
    taps, length = w_q.shape[1], x_q.shape[1]
    past = x_q.new_zeros(x_q.shape[0], taps - 1, x_q.shape[2]) if state_q is None else state_q
    padded = torch.cat([past, x_q], 1)
    inputs, weight = padded.float(), w_q.float()
    y = inputs[:, :length] * weight[:, 0]
    for k in range(1, taps):
        y.addcmul_(inputs[:, k : k + length], weight[:, k])
    y.mul_(x_scale * w_scale.reshape(-1))
    y = y if bias is None else y.add_(bias)
    return torch.nn.functional.silu(y) if activation == "silu" else y, padded[:, length:].clone()


PLAIN = Backend(
    "cpu",
    {"ssmc::int8_linear": int8_linear, "ssmc::int8_causal_conv1d": int8_causal_conv1d},
)
