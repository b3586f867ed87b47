"""The selective scan of Mamba: a diagonal recurrence with input-dependent steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmc.ops.registry import expect_shape, operator
from ssmc.ops.scan import along, step_size

CHUNK_ELEMENTS = 2**19
"""States materialised at a time: few, so that a chunk stays in the cache."""


def _check(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None, state: Tensor | None
) -> None:
    batch, length, width = u.shape
    rank = A.shape[-1]
    for operand, tensor in (("dt", dt), ("z", z)):
        expect_shape("selective_scan", operand, tensor, u.shape)
    for operand, tensor in (("B", B), ("C", C)):
        expect_shape("selective_scan", operand, tensor, (batch, length, rank))
    expect_shape("selective_scan", "A", A, (width, rank))
    expect_shape("selective_scan", "state", state, (batch, width, rank))


def _fake(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state: Tensor | None = None,
    *_: object,
) -> tuple[Tensor, Tensor]:
    _check(u, dt, A, B, C, z, state)
    return scan_fake(u, A)


def scan_fake(u: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Empty (y, new_state) of the scan of u [B, L, D] with A [D, N]."""
    return u.new_empty(u.shape, dtype=torch.float32), A.new_empty((u.shape[0], *A.shape))


@operator(_fake)
def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state: Tensor | None = None,
    softplus: bool = True,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] u[t];  y[t] = (C[t] . h[t] + D u[t]) * silu(z[t]).

    Gu and Dao, 'Mamba', algorithm 2. u, dt, z [B, L, D]; A [D, N]; B, C [B, L, N]; D, dt_bias
    [D]; state [B, D, N], zeros when None. dt is softplus(dt + dt_bias), or dt + dt_bias without
    `softplus`. `reverse` scans from the last position to the first. Returns y [B, L, D] and the
    state after the last position scanned; float32.
    """
    _check(u, dt, A, B, C, z, state)
    dt = step_size(dt, dt_bias, softplus)
    y, new_state = _recur(*along(reverse, dt, dt * u, B, C), A=A, state=state)
    (y,) = along(reverse, y)
    y = y if D is None else y + D * u
    return y if z is None else y * F.silu(z), new_state


def _recur(
    dt: Tensor, dt_u: Tensor, B: Tensor, C: Tensor, *, A: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """C . h for all positions, and the last h [B, D, N]; a chunk of the length at a time."""
    batch, length, width = dt.shape
    rank = A.shape[1]
    h = dt.new_zeros(batch, width, rank) if state is None else state
    # Channels innermost and time outermost: each step works on one contiguous block.
    h = h.transpose(1, 2).contiguous()
    dt, dt_u, B, C = (x.transpose(0, 1).contiguous() for x in (dt, dt_u, B, C))
    chunk = max(1, CHUNK_ELEMENTS // (batch * width * rank))
    y = []
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        decay = (dt[part].unsqueeze(2) * A.T).exp()
        states = []
        for step_decay, step in zip(
            decay, dt_u[part].unsqueeze(2) * B[part].unsqueeze(3), strict=True
        ):
            h = torch.addcmul(step, step_decay, h)
            states.append(h)
        y.append((C[part].unsqueeze(2) @ torch.stack(states)).squeeze(2))
    return torch.cat(y).transpose(0, 1).contiguous(), h.transpose(1, 2).contiguous()
