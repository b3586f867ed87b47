"""Causal self-attention and its rotary positions, matched by structure and written with operators.

Attentions carry the same names of projections and compute different things: other rotations,
windows, norms of queries. So one is matched by its tensors and by what it computes on a probe.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssmc import ops
from ssmc.core.state import OPEN, POSITION
from ssmc.errors import UnsupportedError
from ssmc.frontend.mixers import CACHE_ARGUMENTS, Shapes, State, scaled
from ssmc.frontend.probes import agree, draws, probe, probe_as

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ATTENTION_NORMS = ("q_norm", "k_norm")
ADDED = {"q_proj": "linear_q_adapter_list", "k_proj": "linear_k_adapter_list",
         "v_proj": "linear_v_adapter_list"}  # fmt: skip
"""Lists of low-rank layers beside projections that several layers share, one for each of them."""
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
    rotation = Rotation(draws()(*module.inv_freq.shape), _scale(module))
    buffers = dict.fromkeys(held, rotation.frequencies)
    positions = torch.arange(_LENGTH).unsqueeze(0)
    found = probe(module, buffers, rotation.frequencies, positions)
    expected = _turns(rotation, _LENGTH)
    return isinstance(found, tuple) and all(map(agree, found, expected))


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
    """Whether `module` is causal self-attention over everything before, with grouped heads.

    Rotations that it is handed, it applies.
    """
    return _is_attention(module, turned=True)


def is_unturned_attention(module: Any) -> bool:
    """The same, for one that leaves rotations aside."""
    return _is_attention(module, turned=False)


def unturned_attention(
    module: Any, state: State, hidden_states: Tensor, *_: object, layer_idx: int | None = None,
    **__: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """`attention` without rotations, whatever is handed over."""
    return attention(module, state, hidden_states, layer_idx=layer_idx)


def _is_attention(module: Any, *, turned: bool) -> bool:
    if not all(isinstance(getattr(module, name, None), nn.Linear) for name in ATTENTION):
        return False
    held = {name.partition(".")[0] for name, _ in module.named_parameters()}
    takes = inspect.signature(module.forward).parameters
    return (
        set(ATTENTION) <= held <= {*ATTENTION, *ATTENTION_NORMS, *_added(module)}
        and not CACHE_ARGUMENTS.isdisjoint(takes)
        and isinstance(getattr(module, "head_dim", None), int)
        and _window(module) is None
        and _agrees(module, turned)
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
    layer_idx: int | None = None,
    **__: object,
) -> tuple[Tensor, None]:
    """Attention over [B, L, d]: one graph for any length and any cache.

    `layer_idx` says which layer calls projections that several share (Glorioso et al., 'The Zamba2
    suite', arXiv 2411.15242, figure 2).
    """
    width, position = module.head_dim, state[POSITION]
    q, k, v = (
        _projected(module, name, hidden_states, layer_idx).unflatten(
            -1, (_heads(module, name), width)
        )
        for name in ATTENTION[:3]
    )
    q, k = (
        getattr(module, name)(x) if hasattr(module, name) else x
        for name, x in zip(ATTENTION_NORMS, (q, k), strict=True)
    )
    k = scaled(module, "key_multiplier", k)
    if position_embeddings is not None:
        q = ops.rotary_embedding(q, position_embeddings[0], position, position_embeddings[1])
        k = ops.rotary_embedding(k, position_embeddings[0], position, position_embeddings[1])
    state["k"] = ops.cache_append(state["k"], k, position)
    state["v"] = ops.cache_append(state["v"], v, position)
    y = ops.attention(q, state["k"], state["v"], position, _softmax_scale(module))
    return module.o_proj(y.flatten(-2)), None


def _projected(module: Any, name: str, x: Tensor, layer_idx: int | None) -> Tensor:
    """A projection of x, with what the layer that calls adds to it."""
    result: Tensor = getattr(module, name)(x)
    if not _added(module):
        return result
    return result + getattr(module, ADDED[name])[module.layer_dic[layer_idx]](x)


def _added(module: Any) -> set[str]:
    """The lists of low-rank layers that `module` has: all or none."""
    whole = all(isinstance(getattr(module, n, None), nn.ModuleList) for n in ADDED.values())
    return set(ADDED.values()) if whole and isinstance(module.layer_dic, dict) else set()


def _callers(module: Any) -> list[int | None]:
    """A layer that may call `module`, for a probe: one with low-rank layers where there are any."""
    if not _added(module):
        return [None]
    lists = getattr(module, ADDED["q_proj"])
    return [layer for layer, i in module.layer_dic.items() if not isinstance(lists[i], nn.Identity)]


def _window(module: Any) -> int | None:
    """How many tokens a token looks back at, if not at all: it is in the mask, made elsewhere."""
    holder = module if hasattr(module, "sliding_window") else getattr(module, "config", None)
    return getattr(holder, "sliding_window", None)


def _heads(module: Any, name: str) -> int:
    return int(getattr(module, name).out_features // module.head_dim)


def _softmax_scale(module: Any) -> float:
    return float(getattr(module, "scaling", 1 / math.sqrt(module.head_dim)))


def _agrees(module: Any, turned: bool) -> bool:
    """Whether `module` computes what the adapter does, with rotations or without."""
    draw = draws()
    weights = {name: draw(*_narrow(name, value)) for name, value in module.named_parameters()}
    x, rotation = draw(1, _LENGTH, _WIDTH), None
    future = torch.full((_LENGTH, _LENGTH), -math.inf).triu(1)
    given: dict[str, Any] = {"attention_mask": future[None, None]}
    if "position_embeddings" in inspect.signature(module.forward).parameters:
        rotation = Rotation(draw(module.head_dim // 2), 1.0)
        given["position_embeddings"] = _turns(rotation, _LENGTH)
    for layer in _callers(module)[:1]:
        if "layer_idx" in inspect.signature(module.forward).parameters:
            given["layer_idx"] = layer
        found = probe(module, weights, x, **given)
        if isinstance(found, tuple):
            applied = rotation if turned else None
            expected, _ = probe_as(_from_the_start, module, weights, x, applied, layer)
            return agree(found[0], expected)
    return False


def _from_the_start(
    module: Any, x: Tensor, rotation: Rotation | None, layer: int | None
) -> tuple[Tensor, None]:
    """The adapter, from fresh states."""
    shapes = attention_states(module)
    state = {
        kind: x.new_zeros(len(x), *(x.shape[1] if e == OPEN else e for e in shape))
        for kind, shape in shapes.items()
    }
    state[POSITION] = state[POSITION].long()
    return attention(module, state, x, rotation, layer_idx=layer)


def _turns(rotation: Rotation, length: int) -> tuple[Tensor, Tensor]:
    """The cosines and sines [1, L, 2 R] of the first positions, as modules hand them on."""
    angles = torch.arange(length).unsqueeze(-1) * rotation.frequencies
    angles = angles.repeat(1, 2).unsqueeze(0)
    return angles.cos() * rotation.scale, angles.sin() * rotation.scale


def _narrow(name: str, value: Tensor) -> tuple[int, ...]:
    """The shape of a probe's weight: that of `value`, but for the width of the module's input."""
    layer, _, kind = name.partition(".")
    if layer == "o_proj":
        return (_WIDTH, *value.shape[1:])
    if layer in ADDED.values():  # two layers, of which the first reads the input
        return (value.shape[0], _WIDTH) if name.endswith(".0.weight") else tuple(value.shape)
    return (
        (value.shape[0], _WIDTH) if layer in ATTENTION and kind == "weight" else tuple(value.shape)
    )
