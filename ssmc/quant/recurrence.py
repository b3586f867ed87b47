"""The recurrence of a scan whose state is rounded after every step, with gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Store = Callable[[Tensor, int], Tensor]
"""What of a state [B, H, P, N] is left after step t."""


def rounded_recurrence(
    dt: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor, store: Store
) -> Tensor:
    """h[t] = exp(dt[t] A) store(h[t-1]) + x[t] B[t]';  y[t] = h[t] C[t], for each head.

    x [B, L, H, P]; dt [B, L, H, P or 1]; A [H, P or 1, N or 1], which gets no gradient; B and C
    [B, L, H, N]. Returns y [B, L, H, P]. Rounding is taken for the identity in the gradient
    (straight-through, Bengio et al. 2013, arXiv 1308.3432): backwards it is the plain recurrence
    around the rounded states, of which one is kept for each position.
    """
    y: Tensor = _Recurrence.apply(dt, x, A, B, C, store)
    return y


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dt: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor, store: Store
    ) -> Tensor:
        batch, length, heads, width = x.shape
        h = x.new_zeros(batch, heads, width, B.shape[-1])
        before = x.new_empty(length, *h.shape)
        y = torch.empty_like(x)
        for t in range(length):
            before[t] = h
            h = _step(h, dt[:, t], x[:, t], A, B[:, t])[0]
            y[:, t] = (h @ C[:, t].unsqueeze(-1)).squeeze(-1)
            h = store(h, t)
        ctx.save_for_backward(dt, x, A, B, C, before)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dt, x, A, B, C, before = ctx.saved_tensors
        d_dt, d_x, d_B, d_C = (torch.empty_like(v) for v in (dt, x, B, C))
        g = torch.zeros_like(before[0])  # the gradient of the state after step t
        for t in reversed(range(x.shape[1])):
            h, decay = _step(before[t], dt[:, t], x[:, t], A, B[:, t])
            dy = grads[0][:, t].unsqueeze(-1)
            g = torch.addcmul(g, dy, C[:, t].unsqueeze(-2))
            d_C[:, t] = (h.mT @ dy).squeeze(-1)
            d_x[:, t] = (g @ B[:, t].unsqueeze(-1)).squeeze(-1)
            d_B[:, t] = (g.mT @ x[:, t].unsqueeze(-1)).squeeze(-1)
            g = g * decay
            change = (g * before[t]).sum(-1, keepdim=True) if A.shape[-1] == 1 else g * before[t]
            d_dt[:, t] = (change * A).sum(-1).sum_to_size(dt[:, t].shape)
        return d_dt, d_x, None, d_B, d_C, None


def _step(h: Tensor, dt: Tensor, x: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The next state, and the decay on the way to it."""
    decay = (dt.unsqueeze(-1) * A).exp()
    return torch.addcmul(decay * h, x.unsqueeze(-1), B.unsqueeze(-2)), decay
