"""States of scans as integers, with scales that are computed from the state when it is stored.

A state h is float32 [B, ..., P, N]: batch, heads where there are any, channels, state dimension.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ssmc.errors import UsageError
from ssmc.quant.formats import (
    SMALLEST_SCALE,
    dequantize_tensor,
    pack_int4,
    qmax,
    scale_for,
    unpack_int4,
)

Scales = Literal["tensor", "group", "decoupled"]
"""One scale a sequence; one for each `group` values along N; channels times state dimension."""

_MASK, _GOLDEN, _MIX = 0xFFFFFFFF, 0x9E3779B1, 0x45D9F3B


def is_packed(bits: int, width: int) -> bool:
    """Whether states [..., width] of `bits` bits are stored two values a byte."""
    return bits <= 4 and width % 2 == 0


def state_scale(h: Tensor, scales: str, group: int, bits: int) -> Tensor:
    """The scales of h, bfloat16: 'tensor' [B, 1, ...], 'group' [..., P, N / group].

    'decoupled' [..., P + N] holds those of the channels, then those of the state dimension:
    s[p] = sqrt(mean_n |h[p, n]|) and t[n] = max_p (|h[p, n]| / s[p]) / qmax, so that s t reaches
    every value. Decoupled scale quantisation, Chen et al. 2025, 'Q-Mamba', Findings of ACL 2025
    551; this form of it is that of re-implementations, with scales of 8 significant bits.
    """
    magnitude = h.abs()
    if scales == "tensor":
        return scale_for(magnitude.amax(tuple(range(1, h.dim())), keepdim=True), bits).bfloat16()
    if scales == "group":
        return scale_for(magnitude.unflatten(-1, (-1, group)).amax(-1), bits).bfloat16()
    if scales != "decoupled":
        raise UsageError(f"unknown scales '{scales}'", hint="'tensor', 'group' or 'decoupled'")
    channel = magnitude.mean(-1).sqrt().clamp(min=SMALLEST_SCALE).bfloat16()
    relative = magnitude / channel.float().unsqueeze(-1)
    return torch.cat([channel, scale_for(relative.amax(-2), bits).bfloat16()], -1)


def spread_scale(scale: Tensor, scales: str, width: int) -> Tensor:
    """The scale of each value of a state [..., P, width], float32; 'tensor' [B, 1, ...]."""
    scale = scale.float()
    if scales == "group":
        return scale.repeat_interleave(width // scale.shape[-1], -1)
    if scales == "decoupled":
        channel, state = scale.split([scale.shape[-1] - width, width], -1)
        return channel.unsqueeze(-1) * state.unsqueeze(-2)
    return scale


def quantize_state_tensor(
    h: Tensor, bits: int, scales: str, group: int, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h as (q, scale): q int8, or uint8 [..., N / 2] of packed 4 bits; scale as `state_scale`.

    Half to even, or with `noise` in [0, 1), of the shape of h, floor(h / scale + noise): up with
    the probability of the fraction.
    """
    limit, width = qmax(bits), h.shape[-1]
    scale = state_scale(h, scales, group, bits)
    grid = h * spread_scale(scale, scales, width).clamp(min=SMALLEST_SCALE).reciprocal()
    whole = torch.round(grid) if noise is None else torch.floor(grid + noise)
    q = whole.clamp(-limit, limit).to(torch.int8)
    if is_packed(bits, width):
        q = pack_int4(q.reshape(-1, width), width).view(*h.shape[:-1], width // 2)
    return q, scale


def dequantize_state_tensor(q: Tensor, scale: Tensor, scales: str) -> Tensor:
    """The state float32 [..., P, N] of `quantize_state_tensor`; exact."""
    if q.dtype == torch.uint8:
        width = 2 * q.shape[-1]
        q = unpack_int4(q.reshape(-1, width // 2), width).view(*q.shape[:-1], width)
    return dequantize_tensor(q, spread_scale(scale, scales, q.shape[-1]))


def uniform_noise(step: Tensor, shape: torch.Size, seed: int) -> Tensor:
    """Numbers in [0, 1), float32 of `shape` [B, ...], for states at their step [B, 1].

    They are a hash of seed, step and place in the state: no generator has to be carried, and a
    sequence gets the same ones in any batch and on any device.
    """
    place = torch.arange(shape[1:].numel(), device=step.device)
    when = _hash((step.long() & _MASK) * _GOLDEN + seed)
    bits = _hash(place * _GOLDEN + when)
    return ((bits >> 8).float() * 2.0**-24).view(shape)


def _hash(x: Tensor) -> Tensor:
    """32 well-mixed bits of int64 x; products stay below 2^63. After T. Mueller's integer hash."""
    x = x & _MASK
    for _ in range(2):
        x = ((x ^ (x >> 16)) * _MIX) & _MASK
    return x ^ (x >> 16)
