"""Causal self-attention and its rotary positions, matched by structure and written with operators.

Attentions carry the same names of projections and compute different things: other rotations,
windows, norms of queries. So one is matched by its tensors and by what it computes on a probe. The
probe's weights are narrow: a projection takes whatever width its weight has.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ssmc import ops
from ssmc.core.state import OPEN, POSITION
from ssmc.errors import UnsupportedError
from ssmc.frontend.mixers import CACHE_ARGUMENTS, Shapes, State

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_ROTARY = ("inv_freq", "original_inv_freq")
_LENGTH, _WIDTH = 5, 6  # of probes


class Rotation(NamedTuple):
    """What rotary positions are made of: frequencies [R], and the scale of cosines and sines."""

    frequencies: Tensor
    scale: float


# -- rotary positions -------------------------------------------------------------------------


def is_rotary(module: Any) -> bool:
    """Whether `module` gives cosines and sines of positions times fixed frequencies."""
    held = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    if "inv_freq" not in held or not held <= set(_ROTARY) or module.inv_freq.ndim != 1:
        return False
    frequencies = torch.rand(module.inv_freq.shape[0], generator=_generator())
    positions = torch.arange(_LENGTH).unsqueeze(0)
    try:
        found = functional_call(
            _evaluated(module), dict.fromkeys(held, frequencies), (frequencies, positions)
        )
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False  # it does not take what gives cosines and sines
    expected = _turns(Rotation(frequencies, _scale(module)), _LENGTH)
    return isinstance(found, tuple) and all(
        isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a, b, atol=1e-5)
        for a, b in zip(found, expected, strict=True)
    )


def rotary(module: Any, *_: object, **__: object) -> Rotation:
    """What attentions are handed in place of cosines and sines; they know the positions."""
    if any(kind in str(getattr(module, "rope_type", "")) for kind in ("dynamic", "longrope")):
        raise UnsupportedError(
            f"rotary positions of type '{module.rope_type}': frequencies change with the length"
        )
    return Rotation(module.inv_freq, _scale(module))


def _scale(module: nn.Module) -> float:
    return float(getattr(module, "attention_scaling", 1.0))


# -- attention --------------------------------------------------------------------------------


def is_attention(module: Any) -> bool:
    """Whether `module` is causal self-attention over everything before, with grouped heads."""
    if not all(isinstance(getattr(module, name, None), nn.Linear) for name in ATTENTION):
        return False
    held = {name.partition(".")[0] for name, _ in module.named_parameters()}
    takes = inspect.signature(module.forward).parameters
    return (
        held == set(ATTENTION)
        and not CACHE_ARGUMENTS.isdisjoint(takes)
        and isinstance(getattr(module, "head_dim", None), int)
        and getattr(module, "sliding_window", None) is None
        and _agrees(module)
    )


def attention_states(module: Any) -> Shapes:
    """k and v [room, G, P], and the position []."""
    row = (OPEN, _heads(module, "k_proj"), module.head_dim)
    return {POSITION: (), "k": row, "v": row}


def attention(
    module: Any,
    state: State,
    hidden_states: Tensor,
    position_embeddings: Rotation | None = None,
    *_: object,
    **__: object,
) -> tuple[Tensor, None]:
    """Attention over [B, L, d]: one graph for any length and any cache."""
    width, position = module.head_dim, state[POSITION]
    q, k, v = (
        getattr(module, name)(hidden_states).unflatten(-1, (_heads(module, name), width))
        for name in ATTENTION[:3]
    )
    if position_embeddings is not None:
        q = ops.rotary_embedding(q, position_embeddings[0], position, position_embeddings[1])
        k = ops.rotary_embedding(k, position_embeddings[0], position, position_embeddings[1])
    state["k"] = ops.cache_append(state["k"], k, position)
    state["v"] = ops.cache_append(state["v"], v, position)
    y = ops.attention(q, state["k"], state["v"], position, _softmax_scale(module))
    return module.o_proj(y.flatten(-2)), None


def _heads(module: Any, name: str) -> int:
    return int(getattr(module, name).out_features // module.head_dim)


def _softmax_scale(module: Any) -> float:
    return float(getattr(module, "scaling", 1 / math.sqrt(module.head_dim)))


def _agrees(module: Any) -> bool:
    """Whether `module` computes what the adapter does, on a probe with weights of its own."""
    generator = _generator()
    weights = {
        name: torch.randn(_narrow(name, value), generator=generator)
        for name, value in module.named_parameters()
    }
    x = torch.randn(1, _LENGTH, _WIDTH, generator=generator)
    given: dict[str, Any] = {
        "attention_mask": torch.full((_LENGTH, _LENGTH), -math.inf).triu(1)[None, None]
    }
    rotation = None
    if "position_embeddings" in inspect.signature(module.forward).parameters:
        rotation = Rotation(torch.rand(module.head_dim // 2, generator=generator), 1.0)
        given["position_embeddings"] = _turns(rotation, _LENGTH)
    try:
        found = functional_call(_evaluated(module), weights, (x,), given)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False  # it does not take what attention takes
    state = {
        kind: torch.zeros(1, *(_LENGTH if extent == OPEN else extent for extent in shape))
        for kind, shape in attention_states(module).items()
    }
    state[POSITION] = state[POSITION].long()
    twin = _evaluated(module)
    twin.__dict__["forward"] = functools.partial(attention, twin, state)
    expected, _ = functional_call(twin, weights, (x, rotation))
    return isinstance(found, tuple) and torch.allclose(found[0], expected, rtol=1e-4, atol=1e-4)


def _turns(rotation: Rotation, length: int) -> tuple[Tensor, Tensor]:
    """The cosines and sines [1, L, 2 R] of the first positions, as modules hand them on."""
    angles = torch.arange(length).unsqueeze(-1) * rotation.frequencies
    angles = angles.repeat(1, 2).unsqueeze(0)
    return angles.cos() * rotation.scale, angles.sin() * rotation.scale


def _narrow(name: str, value: Tensor) -> tuple[int, ...]:
    """The shape of a probe's weight: that of `value`, but for the width of the module's input."""
    outer = name.startswith("o_proj")
    if name.endswith("bias"):
        return (_WIDTH,) if outer else tuple(value.shape)
    return (_WIDTH, value.shape[1]) if outer else (value.shape[0], _WIDTH)


def _evaluated(module: nn.Module) -> nn.Module:
    """A twin in evaluation mode that shares everything."""
    twin = copy.copy(module)
    twin.__dict__["training"] = False
    return twin


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
