"""The recurrence of a scan whose state is rounded after every step, with gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Store = Callable[[Tensor, int], Tensor]
"""What of a state [B, H, P, N] is left after step t."""

PART = 8
"""Tokens for which what does not wait for the rounding is computed at once: few calls a token,
and what they give stays in the cache."""


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
        dt, x, B, C = (v.transpose(0, 1).contiguous() for v in (dt, x, B, C))
        h = x.new_zeros(*x.shape[1:], B.shape[-1])
        before, y = [], torch.empty_like(x)
        for part in _parts(len(x)):
            decay, states = _decay(dt[part], A), _outer(x[part], B[part])
            for i, state in enumerate(states):
                before.append(h)
                h = store(state.addcmul_(decay[i], h), part.start + i)
            if not any(ctx.needs_input_grad):
                before.clear()
            y[part] = _times(states, C[part])
        ctx.save_for_backward(dt, x, A, B, C, *before)
        return y.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dt, x, A, B, C, *states = ctx.saved_tensors
        dy = grads[0].transpose(0, 1)
        d_dt, d_x, d_B, d_C = (torch.empty_like(v) for v in (dt, x, B, C))
        after: Tensor | None = None  # what reaches a state from the next one
        for part in reversed(_parts(len(x))):
            decay, before = _decay(dt[part], A), torch.stack(states[part])
            h = _outer(x[part], B[part]).addcmul_(decay, before)
            d_C[part] = _times(h.mT, dy[part])
            g = _outer(dy[part], C[part])  # and, when `after` is added, the states' gradients
            for i in reversed(range(len(g))):
                if after is not None:
                    g[i] += after
                after = g[i] * decay[i]
            d_x[part] = _times(g, B[part])
            d_B[part] = _times(g.mT, x[part])
            change = g.mul_(decay).mul_(before)
            change = change.sum(-1, keepdim=True) if A.shape[-1] == 1 else change
            d_dt[part] = (change * A).sum(-1).sum_to_size(dt[part].shape)
        d_dt, d_x, d_B, d_C = (v.transpose(0, 1) for v in (d_dt, d_x, d_B, d_C))
        return d_dt, d_x, None, d_B, d_C, None


def _parts(length: int) -> list[slice]:
    return [slice(start, start + PART) for start in range(0, length, PART)]


def _decay(dt: Tensor, A: Tensor) -> Tensor:
    return (dt.unsqueeze(-1) * A).exp()


def _outer(x: Tensor, B: Tensor) -> Tensor:
    return x.unsqueeze(-1) * B.unsqueeze(-2)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)
