"""Depthwise causal convolution along the length, with the state that carries it over calls."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmc.errors import UsageError
from ssmc.ops.registry import expect_shape, operator

ACTIVATIONS = {"none": lambda y: y, "silu": F.silu}


def check_conv(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None
) -> None:
    """Raise UsageError, naming `op`, for a weight, bias or state that does not fit x [B, L, C]."""
    batch, _, channels = x.shape
    taps = weight.shape[-1]
    expect_shape(op, "weight", weight, (channels, taps))
    expect_shape(op, "bias", bias, (channels,))
    expect_shape(op, "state", state, (batch, taps - 1, channels))


def conv_fake(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Empty (y float32, new_state of x's type) of a convolution's shapes; checks the operands."""
    check_conv(op, x, weight, bias, state)
    new_state = x.new_empty((x.shape[0], weight.shape[1] - 1, x.shape[2]))
    return x.new_empty(x.shape, dtype=torch.float32), new_state


def with_history(x: Tensor, taps: int, state: Tensor | None) -> Tensor:
    """The taps - 1 inputs before x [B, L, C] (zeros without a state), then x."""
    history = x.new_zeros((x.shape[0], taps - 1, x.shape[2])) if state is None else state
    return torch.cat([history, x], dim=1)


def slide(padded: Tensor, weight: Tensor) -> Tensor:
    """Sum of K shifted products: [B, L+K-1, C] and [C, K] to [B, L, C], in the operands' type."""
    taps = weight.shape[1]
    length = padded.shape[1] - taps + 1
    y = padded[:, :length] * weight[:, 0]
    for k in range(1, taps):
        y.addcmul_(padded[:, k : k + length], weight[:, k])
    return y


def activate(y: Tensor, activation: str) -> Tensor:
    """Apply the named activation, 'none' or 'silu'; UsageError for another name."""
    if activation not in ACTIVATIONS:
        raise UsageError(
            f"ssmc::causal_conv1d: unknown activation '{activation}'",
            hint=f"one of {', '.join(ACTIVATIONS)}",
        )
    return ACTIVATIONS[activation](y)


@operator(
    lambda x, weight, bias=None, state=None, *_: conv_fake("causal_conv1d", x, weight, bias, state)
)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    activation: str = "none",
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """y[t] = act(sum_k weight[:, k] x[t - K + 1 + k] + bias) for each channel.

    x [B, L, C] of any length, weight [C, K], bias [C]. `state` [B, K-1, C] holds the inputs
    before x, zeros when None. Returns y [B, L, C] and the state for the next call. `exact` sums
    the taps in float64 and rounds once to float32 before the bias, as in `linear`.
    """
    check_conv("causal_conv1d", x, weight, bias, state)
    padded = with_history(x, weight.shape[1], state)
    y = slide(padded.double(), weight.double()).float() if exact else slide(padded, weight)
    y = y if bias is None else y + bias
    return activate(y, activation), padded[:, x.shape[1] :].clone()
