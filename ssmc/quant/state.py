"""States of scans as integers, with scales that are computed from the state when it is stored.

A state h is float32 [B, ..., P, N]: batch, heads where there are any, channels, state dimension.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ssmc.errors import UsageError
from ssmc.quant.formats import (
    SMALLEST_SCALE,
    dequantize_tensor,
    pack,
    qmax,
    scale_for,
    unpack,
)

Scales = Literal["tensor", "group", "decoupled", "decoupled-max"]
"""One scale a sequence; one for each `group` values along N; channels times state dimension."""

DECOUPLED = ("decoupled", "decoupled-max")

SMALLEST_CHANNEL = 2.0**-64
"""Floor of a channel's scale: it times that of a place in the state dimension stays normal."""

_GOLDEN, _MIX = 0x9E3779B1 - 2**32, 0x45D9F3B


def is_packed(bits: int, width: int) -> bool:
    """Whether states [..., width] of `bits` bits are stored two values a byte."""
    return bits <= 4 and width % 2 == 0


def state_scale(h: Tensor, scales: str, group: int, bits: int) -> Tensor:
    """The scales of h, bfloat16: 'tensor' [B, 1, ...], 'group' [..., P, N / group].

    Both have a sign, so that the lowest integer, -2^(bits - 1), which has no counterpart, is there
    for the side that reaches further (as `WeightFormat` has it for weights).
    'decoupled' [..., P + N] holds those of the channels, then those of the state dimension:
    s[p] = sqrt(mean_n |h[p, n]|) and t[n] = max_p (|h[p, n]| / s[p]) / qmax, so that s t reaches
    every value. Decoupled scale quantisation, Chen et al. 2025, 'Q-Mamba', Findings of ACL 2025
    551; this form of it is that of re-implementations, with scales of 8 significant bits.
    'decoupled-max' has s[p] = max_n |h[p, n]|: finer steps for small channels, coarser for large.
    """
    if scales == "tensor":
        return _signed_scale(h, tuple(range(1, h.dim())), bits, keepdim=True)
    if scales == "group":
        return _signed_scale(h.unflatten(-1, (-1, group)), (-1,), bits)
    if scales not in DECOUPLED:
        known = ", ".join(get_args(Scales))
        raise UsageError(f"unknown scales '{scales}'", hint=f"they are {known}")
    magnitude = h.abs()
    size = magnitude.mean(-1).sqrt() if scales == "decoupled" else magnitude.amax(-1)
    channel = size.clamp(min=SMALLEST_CHANNEL).bfloat16()
    relative = magnitude / channel.float().unsqueeze(-1)
    return torch.cat([channel, scale_for(relative.amax(-2), bits).bfloat16()], -1)


def _signed_scale(h: Tensor, dims: tuple[int, ...], bits: int, keepdim: bool = False) -> Tensor:
    """The smallest scale by which integers from -2^(bits - 1) on reach all of h over `dims`."""
    above, below = h.amax(dims, keepdim), -h.amin(dims, keepdim)
    further, nearer = above.maximum(below), above.minimum(below)
    longer = further * (qmax(bits) / (qmax(bits) + 1))
    scale = scale_for(longer.maximum(nearer), bits)
    return torch.where(above > below, -scale, scale).bfloat16()


def spread_scale(scale: Tensor, scales: str, width: int) -> Tensor:
    """The scale of each value of a state [..., P, width], float32; 'tensor' [B, 1, ...]."""
    scale = scale.float()
    if scales == "group":
        return scale.repeat_interleave(width // scale.shape[-1], -1)
    if scales in DECOUPLED:
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
    scale, width = state_scale(h, scales, group, bits), h.shape[-1]
    q = _whole(h, spread_scale(scale, scales, width), bits, scales, noise).to(torch.int8)
    if is_packed(bits, width):
        q = pack(q.reshape(-1, width), 4, width).view(*h.shape[:-1], width // 2)
    return q, scale


def round_state_tensor(
    h: Tensor, bits: int, scales: str, group: int, noise: Tensor | None = None
) -> Tensor:
    """What is left of h when it has been stored: both functions at once, without the integers."""
    scale = spread_scale(state_scale(h, scales, group, bits), scales, h.shape[-1])
    return _whole(h, scale, bits, scales, noise) * scale


def _whole(h: Tensor, scale: Tensor, bits: int, scales: str, noise: Tensor | None) -> Tensor:
    limit = qmax(bits)
    grid = h * scale.abs().clamp(min=SMALLEST_SCALE).copysign(scale).reciprocal()
    whole = torch.round(grid) if noise is None else torch.floor(grid + noise)
    return whole.clamp(-limit - (scales not in DECOUPLED), limit)


def dequantize_state_tensor(q: Tensor, scale: Tensor, scales: str) -> Tensor:
    """The state float32 [..., P, N] of `quantize_state_tensor`; exact."""
    if q.dtype == torch.uint8:
        width = 2 * q.shape[-1]
        q = unpack(q.reshape(-1, width // 2), 4, width).view(*q.shape[:-1], width)
    return dequantize_tensor(q, spread_scale(scale, scales, q.shape[-1]))


def uniform_noise(step: Tensor, shape: torch.Size, seed: int) -> Tensor:
    """Numbers in [0, 1), float32 of `shape` [B, ...], for states at their step [B, 1].

    They are a hash of seed, step and place in the state: no generator has to be carried, and a
    sequence gets the same ones in any batch and on any device.
    """
    place = torch.arange(shape[1:].numel(), dtype=torch.int32, device=step.device)
    when = _hash(step.to(torch.int32) * _GOLDEN + (seed & 0x7FFFFFFF))
    bits = _hash(place * _GOLDEN + when)
    return (bits >> 8).bitwise_and_(0xFFFFFF).float().mul_(2.0**-24).view(shape)


def _hash(x: Tensor) -> Tensor:
    """32 well-mixed bits of int32 x [..., n], which is overwritten; after T. Mueller.

    Integers wrap around, and shifts, which keep the sign, are masked.
    """
    for _ in range(2):
        x ^= (x >> 16).bitwise_and_(0xFFFF)
        x *= _MIX
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x
