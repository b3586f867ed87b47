"""A selective scan to train with, in plain torch: differentiable, parallel enough for a GPU.

Hugging Face's own training path without compiled kernels runs one step after the other over the
whole length. Here the length is cut into chunks of about its square root: a sequence of 1,024
tokens takes 32 steps inside all chunks at once and 32 from chunk to chunk. Decays are only ever
multiplied, never divided by, so the result does not lose precision where they underflow.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import MambaForCausalLM
from transformers.models.mamba.modeling_mamba import MambaMixer


def chunked_recurrence(decay: Tensor, drive: Tensor) -> Tensor:
    """Every state of h[t] = decay[t] * h[t-1] + drive[t] with h[-1] = 0.

    Shapes: decay, drive and the result [batch, length, ...].
    """
    length = drive.shape[1]
    size = max(1, math.isqrt(length))
    decay, drive = _in_chunks(decay, size), _in_chunks(drive, size)
    states = torch.empty_like(drive)
    state = _entry_states(decay, drive)
    for t in range(size):
        state = torch.addcmul(drive[:, :, t], decay[:, :, t], state)
        states[:, :, t] = state
    return states.flatten(1, 2)[:, :length]


def _in_chunks(x: Tensor, size: int) -> Tensor:
    """[batch, length, ...] -> [batch, chunks, size, ...], zeros behind the end."""
    missing = -x.shape[1] % size
    if missing:
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)
    return x.unflatten(1, (-1, size))


def _entry_states(decay: Tensor, drive: Tensor) -> Tensor:
    """The state before each chunk, [batch, chunks, ...], of inputs [batch, chunks, size, ...]."""
    final, product = drive[:, :, 0], decay[:, :, 0]
    for t in range(1, drive.shape[2]):
        final = torch.addcmul(drive[:, :, t], decay[:, :, t], final)
        product = product * decay[:, :, t]
    entry = torch.zeros_like(final)
    for chunk in range(1, final.shape[1]):
        entry[:, chunk] = final[:, chunk - 1] + product[:, chunk - 1] * entry[:, chunk - 1]
    return entry


class _LinearRecurrence(torch.autograd.Function):
    """`chunked_recurrence` with its gradient, which is the same recurrence run backwards."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, drive: Tensor) -> Tensor:
        states = chunked_recurrence(decay, drive)
        ctx.save_for_backward(decay, states)
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        # g[t] = grad[t] + decay[t+1] * g[t+1];  d drive[t] = g[t];  d decay[t] = g[t] * h[t-1]
        decay, states = ctx.saved_tensors
        following = _shift(decay, -1)
        grad_drive = chunked_recurrence(following.flip(1), grad.flip(1)).flip(1)
        return grad_drive * _shift(states, 1), grad_drive


def _shift(x: Tensor, by: int) -> Tensor:
    """x moved `by` (1 or -1) places along the length, zeros moved in."""
    edge = x.new_zeros(x[:, :1].shape)
    return torch.cat([edge, x[:, :-1]] if by > 0 else [x[:, 1:], edge], dim=1)


def linear_recurrence(decay: Tensor, drive: Tensor) -> Tensor:
    """`chunked_recurrence`, differentiable in both arguments."""
    states: Tensor = _LinearRecurrence.apply(decay, drive)
    return states


def selective_scan(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """The selective scan (Mamba paper, algorithm 2): discretise, recur, read out, skip.

    Shapes: u and dt [batch, length, channels] with dt > 0, a [channels, state] with a < 0,
    b and c [batch, length, state], d [channels]; the result is [batch, length, channels].
    """
    decay = torch.exp(dt[..., None] * a)
    drive = (dt * u)[..., None] * b[:, :, None, :]
    states = linear_recurrence(decay, drive)
    return (states @ c[..., None]).squeeze(-1) + u * d


def mixer_forward(mixer: MambaMixer, hidden: Tensor, **_: object) -> Tensor:
    """A Mamba-1 mixer without a cache; the scan runs in float32 and is recomputed backwards.

    The scan's operands are the model's largest tensors by a factor of the state size, so only
    one layer's at a time are held.
    """
    length, rank, state = hidden.shape[1], mixer.time_step_rank, mixer.ssm_state_size
    x, gate = mixer.in_proj(hidden).chunk(2, dim=-1)
    x = F.silu(mixer.conv1d(x.transpose(1, 2))[..., :length]).transpose(1, 2)
    low, b, c = mixer.x_proj(x).split([rank, state, state], dim=-1)
    low = F.linear(low, mixer.dt_proj.weight)
    with torch.autocast(hidden.device.type, enabled=False):
        dt = F.softplus(low.float() + mixer.dt_proj.bias.float())
        operands = (x, dt, -torch.exp(mixer.A_log.float()), b, c, mixer.D)
        y = checkpoint(selective_scan, *(t.float() for t in operands), use_reentrant=False)
    return mixer.out_proj((y * F.silu(gate.float())).to(hidden.dtype))


def use_training_scan(model: MambaForCausalLM) -> None:
    """Have every mixer of `model` run `mixer_forward`; its parameters stay as they are."""
    for module in model.modules():
        if isinstance(module, MambaMixer):
            module.forward = partial(mixer_forward, module)
