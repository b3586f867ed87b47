"""Attention over a cache of keys and values, and what belongs to it: positions and rotations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ssmc.errors import UsageError
from ssmc.ops.registry import expect_shape, operator
from ssmc.quant.formats import dequantize_tensor


def check_rotary(x: Tensor, frequencies: Tensor, position: Tensor) -> None:
    """Raise UsageError for frequencies or positions that do not fit x [B, L, H, P]."""
    expect_shape("rotary_embedding", "position", position, x.shape[:1])
    if frequencies.dim() != 1 or 2 * frequencies.shape[0] > x.shape[-1]:
        raise UsageError(
            f"ssmc::rotary_embedding: frequencies {list(frequencies.shape)} for heads of "
            f"{x.shape[-1]} channels",
            hint="each frequency turns two channels",
        )


def _rotary_fake(x: Tensor, frequencies: Tensor, position: Tensor, scale: float = 1.0) -> Tensor:
    check_rotary(x, frequencies, position)
    return x.new_empty(x.shape)


@operator(_rotary_fake)
def rotary_embedding(
    x: Tensor, frequencies: Tensor, position: Tensor, scale: float = 1.0
) -> Tensor:
    """Turn pairs of channels of x [B, L, H, P] by angles that grow with the token's position.

    Su et al., 'RoFormer', eq. 34: channels i and i + R of token t turn by (position + t) *
    frequencies[i], for frequencies [R]; channels from 2 R on stay. position [B] int64 is that of
    the first token of each sequence. Cosines and sines are times `scale`.
    """
    check_rotary(x, frequencies, position)
    angles = (_positions(position, x.shape[1]).unsqueeze(-1).float() * frequencies).unsqueeze(2)
    cos, sin = angles.cos() * scale, angles.sin() * scale
    pairs = frequencies.shape[0]
    a, b, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def _positions(position: Tensor, length: int) -> Tensor:
    """The positions [B, L] of tokens that start at position [B]."""
    return position.unsqueeze(1) + torch.arange(length, device=position.device)


def _append_fake(cache: Tensor, x: Tensor, position: Tensor) -> Tensor:
    expect_shape("cache_append", "x", x, (cache.shape[0], x.shape[1], *cache.shape[2:]))
    expect_shape("cache_append", "position", position, cache.shape[:1])
    return cache.new_empty(cache.shape)


@operator(_append_fake)
def cache_append(cache: Tensor, x: Tensor, position: Tensor) -> Tensor:
    """The cache [B, T, ...] with x [B, L, ...] in its rows from position [B] (int64) on.

    Rows behind those are as they were: what attends looks at rows up to a token's own only. Raises
    UsageError where the cache lacks room (on a GPU torch's own assertion).
    """
    _append_fake(cache, x, position)
    if not cache.is_cuda:  # a GPU would be waited for
        check_room(cache, x, position)
    rows = torch.arange(cache.shape[0], device=cache.device).unsqueeze(1)
    return cache.index_put((rows, _positions(position, x.shape[1])), x)


def check_room(cache: Tensor, x: Tensor, position: Tensor) -> None:
    """Raise UsageError where the cache has no room for x [B, L, ...] from position [B] on."""
    needed = int(position.max()) + x.shape[1]
    if needed > cache.shape[1]:
        raise UsageError(
            f"ssmc::cache_append: a cache of {cache.shape[1]} tokens has no room for {needed}",
            hint="make the states with more room: fresh_states(g.states, batch, room=...)",
        )


def check_attention(op: str, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
    """Raise UsageError, naming `op`, for keys, values or positions that do not fit q."""
    batch, _, heads, width = q.shape
    expect_shape(op, "k", k, (batch, *k.shape[1:3], width))
    expect_shape(op, "v", v, (*k.shape[:3], v.shape[-1]))
    expect_shape(op, "position", position, (batch,))
    if heads % k.shape[2]:
        raise UsageError(f"ssmc::{op}: {k.shape[2]} heads of keys do not divide {heads} of queries")


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, scale: float | None = None
) -> Tensor:
    check_attention("attention", q, k, v, position)
    return q.new_empty((*q.shape[:3], v.shape[-1]))


@operator(_attention_fake)
def attention(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, scale: float | None = None
) -> Tensor:
    """Causal attention: softmax(scale q k') v, of each token over those up to its own position.

    Vaswani et al., 'Attention is all you need', eq. 1, with G heads of keys and values that serve
    H / G heads of queries each (Ainslie et al., 'GQA', section 2.2). q [B, L, H, P]; k [B, T, G, P]
    and v [B, T, G, V] hold a row for each token from the start of the sequence; position [B] int64
    is that of the first query. `scale` is 1 / sqrt(P) when None. Returns [B, L, H, V].
    """
    check_attention("attention", q, k, v, position)
    k, v = (_seen(cache, q, position) for cache in (k, v))
    grouped = q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)  # [B, G, H / G, L, P]
    scores = grouped @ k.permute(0, 2, 3, 1).unsqueeze(2)
    scores = scores * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    rows = torch.arange(k.shape[1], device=q.device)
    later = rows > _positions(position, q.shape[1]).unsqueeze(-1)  # [B, L, T]
    weights = scores.masked_fill(later[:, None, None], -math.inf).softmax(-1)
    y = weights @ v.permute(0, 2, 1, 3).unsqueeze(2)
    return y.permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()


def _seen(cache: Tensor, q: Tensor, position: Tensor) -> Tensor:
    """The rows that a query looks at; all of them on a GPU, which would be waited for."""
    return cache if q.is_cuda else cache[:, : int(position.max()) + q.shape[1]]


@operator(lambda q, k_q, k_scale, v_q, *_: q.new_empty((*q.shape[:3], v_q.shape[-1])))
def int8_attention(
    q: Tensor,
    k_q: Tensor,
    k_scale: Tensor,
    v_q: Tensor,
    v_scale: Tensor,
    position: Tensor,
    scale: float | None = None,
) -> Tensor:
    """`attention` of float32 q over int8 k_q [B, T, G, P] and v_q [B, T, G, V].

    Their scales [B, T, G, 1], float32 or bfloat16, are one for each token and head. Returns float32
    [B, L, H, V].
    """
    pairs = ((k_q, k_scale), (v_q, v_scale))
    k, v = (dequantize_tensor(*(_seen(c, q, position) for c in pair)) for pair in pairs)
    return attention(q, k, v, position, scale)
