"""The Mamba-1 and Mamba-2 mixers, matched by structure and written with the operators.

Whatever the class is called, a mixer is known by its tensors; one that has a tensor the
published architecture has not computes something else and is not matched.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmc import ops
from ssmc.errors import UnsupportedError

MAMBA1 = ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "out_proj")
MAMBA1_NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")
MAMBA2 = ("in_proj", "conv1d", "dt_bias", "A_log", "D", "out_proj")
MAMBA2_NORMS = ("norm",)
MAMBA2_SCALES = ("mup_vector",)

State = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]
CACHE_ARGUMENTS = {"cache_params", "past_key_values", "inference_params"}


def is_mamba1(module: nn.Module) -> bool:
    """Whether `module` is a mixer of Gu and Dao, 'Mamba', figure 3, with or without inner norms."""
    return _is_mixer(module, MAMBA1, MAMBA1_NORMS, A_log_dims=2)


def is_mamba2(module: nn.Module) -> bool:
    """Whether `module` is a mixer of Dao and Gu, 'Transformers are SSMs', figure 6 (right)."""
    return _is_mixer(module, MAMBA2, MAMBA2_NORMS + MAMBA2_SCALES, A_log_dims=1)


def _is_mixer(
    module: Any, required: tuple[str, ...], optional: tuple[str, ...], *, A_log_dims: int
) -> bool:
    """Whether the module's tensors lie under exactly these names and its forward takes a cache.

    A forward without a cache is its author's own, even where the names agree.
    """
    if not all(hasattr(module, name) for name in required):
        return False
    tensors = [*module.named_parameters(), *module.named_buffers()]
    held = {name.partition(".")[0] for name, _ in tensors}
    takes = inspect.signature(module.forward).parameters
    return (
        set(required) <= held <= {*required, *optional}
        and not CACHE_ARGUMENTS.isdisjoint(takes)
        and module.A_log.ndim == A_log_dims
    )


def mamba1_states(mixer: Any) -> Shapes:
    """conv [K-1, D] and ssm [D, N]."""
    return {"conv": _conv_state(mixer), "ssm": tuple(mixer.A_log.shape)}


def mamba2_states(mixer: Any) -> Shapes:
    """conv [K-1, D + 2GN] and ssm [H, P, N]."""
    heads, width, _, rank = _mamba2_sizes(mixer)
    return {"conv": _conv_state(mixer), "ssm": (heads, width, rank)}


def _conv_state(mixer: Any) -> tuple[int, int]:
    channels, _, taps = mixer.conv1d.weight.shape
    return taps - 1, channels


def mamba1(mixer: Any, state: State, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
    """The Mamba-1 mixer over [B, L, d]: one graph for any length and any state."""
    width, rank = mixer.A_log.shape
    x, z = mixer.in_proj(hidden_states).split([width, width], dim=-1)
    x = _convolve(mixer, state, x)
    dt, B, C = mixer.x_proj(x).split([mixer.dt_proj.in_features, rank, rank], dim=-1)
    if hasattr(mixer, "dt_layernorm"):
        dt, B, C = mixer.dt_layernorm(dt), mixer.b_layernorm(B), mixer.c_layernorm(C)
    dt = ops.linear(dt, mixer.dt_proj.weight)
    y, state["ssm"] = ops.selective_scan(
        x, dt, _decay(mixer), B, C, mixer.D, z, mixer.dt_proj.bias, state["ssm"]
    )
    return mixer.out_proj(y)


def mamba2(mixer: Any, state: State, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
    """The Mamba-2 mixer over [B, L, d]: one graph for any length and any state."""
    heads, width, groups, rank = _mamba2_sizes(mixer)
    inner, grouped = heads * width, groups * rank
    projected = mixer.in_proj(scaled(mixer, "ssm_in_multiplier", hidden_states))
    if hasattr(mixer, "mup_vector"):
        projected = projected * mixer.mup_vector
    z, xBC, dt = projected.split([inner, inner + 2 * grouped, heads], dim=-1)
    x, B, C = _convolve(mixer, state, xBC).split([inner, grouped, grouped], dim=-1)
    y, state["ssm"] = ops.ssd_scan(
        x.unflatten(-1, (heads, width)),
        dt,
        _decay(mixer),
        B.unflatten(-1, (groups, rank)),
        C.unflatten(-1, (groups, rank)),
        mixer.D,
        mixer.dt_bias,
        state["ssm"],
        *_dt_limits(mixer),
    )
    y = y.flatten(-2)
    y = mixer.norm(y, z) if _has_norm(mixer) else y * F.silu(z)
    return mixer.out_proj(y)


def scaled(module: nn.Module, name: str, x: Tensor) -> Tensor:
    """x times the module's multiplier of that name, where it has one and that is not one."""
    multiplier = float(getattr(module, name, 1.0))
    return x if multiplier == 1 else x * multiplier


def _has_norm(mixer: nn.Module) -> bool:
    return not isinstance(getattr(mixer, "norm", None), nn.Identity | None)


def _convolve(mixer: Any, state: State, x: Tensor) -> Tensor:
    conv = mixer.conv1d
    y, state["conv"] = ops.causal_conv1d(
        x, conv.weight.squeeze(1), conv.bias, state["conv"], _activation(mixer)
    )
    return y


def _decay(mixer: Any) -> Tensor:
    return -torch.exp(mixer.A_log.float())


def _activation(mixer: nn.Module) -> str:
    name = getattr(mixer, "activation", "silu")
    if name not in ("silu", "swish"):
        raise UnsupportedError(f"activation '{name}' after the convolution; only silu is supported")
    return "silu"


def _mamba2_sizes(mixer: Any) -> tuple[int, int, int, int]:
    """Heads H, head width P, groups G and state size N, from the tensors."""
    heads, inner = mixer.A_log.shape[0], mixer.out_proj.in_features
    groups = mixer.n_groups if hasattr(mixer, "n_groups") else mixer.ngroups
    rank = (mixer.conv1d.weight.shape[0] - inner) // (2 * groups)
    return heads, inner // heads, groups, rank


def _dt_limits(mixer: nn.Module) -> tuple[float, float]:
    low, high = getattr(mixer, "time_step_limit", (0.0, math.inf))
    return float(low), min(float(high), torch.finfo(torch.float32).max)
