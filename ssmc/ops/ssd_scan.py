"""The scan of Mamba-2 (state-space duality): one decay a head, states of [P, N]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ssmc.ops.registry import expect_shape, operator
from ssmc.ops.scan import along, step_size

CHUNK = 64
"""Positions whose interactions are computed as one matrix product."""


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> None:
    batch, length, heads, width = x.shape
    groups, rank = B.shape[2:]
    expect_shape("ssd_scan", "dt", dt, (batch, length, heads))
    expect_shape("ssd_scan", "A", A, (heads,))
    for operand, tensor in (("B", B), ("C", C)):
        expect_shape("ssd_scan", operand, tensor, (batch, length, groups, rank))
    expect_shape("ssd_scan", "state", state, (batch, heads, width, rank))


def _fake(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state: Tensor | None = None,
    *_: object,
) -> tuple[Tensor, Tensor]:
    _check(x, dt, A, B, C, state)
    return ssd_fake(x, A, B)


def ssd_fake(x: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Empty (y, new_state) of the scan of x [B, L, H, P] with B [B, L, G, N]."""
    batch, _, heads, width = x.shape
    y = x.new_empty(x.shape, dtype=torch.float32)
    return y, A.new_empty((batch, heads, width, B.shape[3]))


@operator(_fake)
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state: Tensor | None = None,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]';  y[t] = h[t] C[t] + D x[t], for each head.

    Dao and Gu, 'Transformers are SSMs', eq. 1 with scalar A, computed in chunks (section 6);
    `naive` is the sequential definition. x [B, L, H, P]; dt [B, L, H]; A, D, dt_bias [H]; B and C
    [B, L, G, N], each group serving H / G heads; state [B, H, P, N], zeros when None. dt is
    softplus(dt + dt_bias) clamped to [dt_min, dt_max]. `reverse` scans from the last position to
    the first. Returns y like x and the state after the last position scanned; float32.
    """
    _check(x, dt, A, B, C, state)
    dt = step_size(dt, dt_bias, softplus=True).clamp(dt_min, dt_max)
    h = initial_state(x, B) if state is None else state
    y, h = _chunks(h, along(reverse, x * dt.unsqueeze(-1), dt * A, B, C))
    (y,) = along(reverse, y)
    return y if D is None else (D.unsqueeze(-1) * x).add_(y), h


def initial_state(x: Tensor, B: Tensor) -> Tensor:
    """Zeros [B, H, P, N] for x [B, L, H, P] and B [B, L, G, N]."""
    return x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3])


def _chunks(h: Tensor, sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All chunks, one after the other, of the operands of `_chunk`; y, and the last state."""
    outputs = []
    for part in zip(*(x.split(CHUNK, dim=1) for x in sequences), strict=True):
        y, h = _chunk(h, *part)
        outputs.append(y)
    return torch.cat(outputs, dim=1), h


def _chunk(
    h: Tensor, dt_x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk of T positions from state h: what its inputs and h give to y, and the next state.

    dt_x [B, T, H, P], log_decay [B, T, H], B and C [B, T, G, N], h [B, H, P, N].
    """
    heads, groups = dt_x.shape[2], B.shape[2]
    B, C = (w.transpose(1, 2).repeat_interleave(heads // groups, dim=1) for w in (B, C))
    dt_x = dt_x.transpose(1, 2)
    # Differences of long sums of decays: in float32 they would cancel.
    total = log_decay.double().cumsum(1).transpose(1, 2)
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).float()
    future = torch.ones_like(between[0, 0], dtype=torch.bool).triu(1)
    decay = between.masked_fill(future, -math.inf).exp()
    since_start = total.float().exp().unsqueeze(-1)
    until_end = decay[:, :, -1].unsqueeze(-1)
    y = (C @ B.mT * decay) @ dt_x + (C @ h.mT) * since_start
    h = since_start[:, :, -1:] * h + (dt_x * until_end).mT @ B
    return y.transpose(1, 2), h


def naive(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state: Tensor | None = None,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The recurrence of `ssd_scan`, one position after the other: its specification."""
    heads, groups = x.shape[2], B.shape[2]
    dt = step_size(dt, dt_bias, softplus=True).clamp(dt_min, dt_max)
    B, C = (w.repeat_interleave(heads // groups, dim=2) for w in (B, C))
    h = initial_state(x, B) if state is None else state
    y = torch.empty_like(x)
    positions = range(x.shape[1])
    for t in reversed(positions) if reverse else positions:
        decay = (dt[:, t] * A).exp()[..., None, None]
        update = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        h = decay * h + update
        y[:, t] = torch.einsum("bhpn,bhn->bhp", h, C[:, t])
    return y if D is None else y + D.unsqueeze(-1) * x, h
