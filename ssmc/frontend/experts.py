"""Mixtures of experts, matched by structure and by what they compute, written with operators.

Either a router and gated experts, or a router that chooses by scores, plain experts, and an MLP
that every token has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmc import ops
from ssmc.frontend.probes import agree, draws, probe, probe_as

_LENGTH, _INNER = 7, 4  # of probes, whose experts are as narrow as that


def is_mixture(module: nn.Module) -> bool:
    """Whether `module` sums the experts, gated MLPs all, that its router chooses for a token.

    Fedus et al., 'Switch transformers', section 2.1, with all experts' weights in two tensors.
    """
    return _agrees(module, mixture)


def mixture(module: Any, hidden_states: Tensor) -> Tensor:
    """The likeliest experts for each token of [B, L, d], times their probabilities, summed."""
    return _sum(module, hidden_states, *_chosen(module, hidden_states))


def is_even_mixture(module: nn.Module) -> bool:
    """The same, where the weights of a token's experts sum to one."""
    return _agrees(module, even_mixture)


def even_mixture(module: Any, hidden_states: Tensor) -> Tensor:
    """The likeliest experts for each token, times their shares of the probabilities, summed."""
    weights, index = _chosen(module, hidden_states)
    return _sum(module, hidden_states, weights / weights.sum(-1, keepdim=True), index)


def is_shared_mixture(module: nn.Module) -> bool:
    """Whether `module` adds an MLP that every token has to plain experts chosen by scores.

    DeepSeek-AI, 'DeepSeek-V3', section 2.1.2, equations 12 to 16, without limits by groups; experts
    are two layers with an activation between.
    """
    parts = _shared_parts(module)
    if parts is None:
        return False
    (router, experts, _), draw = parts, draws()
    count, width = router.weight.shape
    narrow = {
        id(experts.up_proj): (count, _INNER, width),
        id(experts.down_proj): (count, width, _INNER),
    }
    weights = {n: draw(*narrow.get(id(t), t.shape)) for n, t in _held(module)}
    x = draw(1, _LENGTH, width)
    found = probe(module, weights, x)
    return found is not None and agree(found, probe_as(shared_mixture, module, weights, x))


def shared_mixture(module: Any, hidden_states: Tensor) -> Tensor:
    """The chosen experts of each token of [B, L, d], times their weights, and the shared one.

    Experts are chosen by sigmoids with a correction, which their weights lack.
    """
    router, experts, shared = _shared_parts(module)  # type: ignore[misc]
    scores = torch.sigmoid(ops.linear(hidden_states, router.weight))
    _, index = ops.top_k(scores + router.e_score_correction_bias, router.top_k)
    weights = torch.gather(scores, -1, index)
    if router.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    inner = experts.act_fn(ops.expert_linear(hidden_states, experts.up_proj, index))
    y = ops.expert_linear(inner, experts.down_proj, index)
    y = (y * (weights * router.routed_scaling_factor).unsqueeze(-1)).sum(2)
    result: Tensor = y + shared(hidden_states)
    return result


def _shared_parts(module: nn.Module) -> tuple[Any, Any, Any] | None:
    """Router, experts and shared MLP, where `module` holds the tensors of these alone."""
    children = [child for child in module.children() if _tensors(child)]
    routers = [c for c in children if set(_tensors(c)) == {"weight", "e_score_correction_bias"}]
    experts = [c for c in children if set(_tensors(c)) == {"up_proj", "down_proj"}]
    others = [c for c in children if c not in routers and c not in experts]
    if not len(routers) == len(experts) == len(others) == 1:
        return None
    whole = sum(len(_tensors(c)) for c in children) == len(_tensors(module))
    return (routers[0], experts[0], others[0]) if whole else None


def _chosen(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    router, _ = _parts(module)
    return ops.top_k(F.softmax(ops.linear(x, router.weight), dim=-1), _top_k(module, router))


def _sum(module: Any, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    _, experts = _parts(module)
    gate, up = ops.expert_linear(x, experts.gate_up_proj, index).chunk(2, -1)
    y = ops.expert_linear(F.silu(gate) * up, experts.down_proj, index)
    return (y * weights.unsqueeze(-1)).sum(2)


def _agrees(module: nn.Module, forward: Callable[[Any, Tensor], Tensor]) -> bool:
    """Whether `module` computes what `forward` does."""
    router, experts = _parts(module)
    if router is None:
        return False
    draw, (count, width) = draws(), router.weight.shape
    narrow = {
        id(router.weight): (count, width),
        id(experts.gate_up_proj): (count, 2 * _INNER, width),
        id(experts.down_proj): (count, width, _INNER),
    }
    weights = {name: draw(*narrow[id(value)]) for name, value in module.named_parameters()}
    x = draw(1, _LENGTH, width)
    found = probe(module, weights, x)
    return found is not None and agree(found, probe_as(forward, module, weights, x))


def _parts(module: nn.Module) -> tuple[Any, Any]:
    """The router and the experts, where `module` is made of these alone; else None for both."""
    children = list(module.children())
    routers = [c for c in children if set(_tensors(c)) == {"weight"} and _top_k(module, c)]
    experts = [c for c in children if set(_tensors(c)) == {"gate_up_proj", "down_proj"}]
    whole = len(children) == 2 and len(_tensors(module)) == 3
    return (routers[0], experts[0]) if whole and routers and experts else (None, None)


def _top_k(module: Any, router: Any) -> int:
    """How many experts a token has, by the router or, where that is a plain layer, its owner."""
    return int(getattr(router, "top_k", getattr(module, "top_k", 0)))


def _tensors(module: nn.Module) -> list[str]:
    return [name for name, _ in _held(module)]


def _held(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
