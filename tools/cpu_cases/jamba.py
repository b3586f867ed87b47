"""Attention, gated MLPs and mixtures of experts, as in Jamba and Llama."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cpu_cases.case import Case, weight
from cpu_cases.mamba import Mamba, scan_step
from cpu_cases.shared import QUANTISE, Call, rotating
from ssmc.kernels.cpu.attention import attention, int8_attention
from ssmc.kernels.cpu.cache import cache_append, cache_append_step, cache_quantize_step
from ssmc.kernels.cpu.experts import int8_expert_linear, int8_expert_linear_sum
from ssmc.kernels.cpu.mlp import silu_mul_quantize, softmax_top_k
from ssmc.kernels.cpu.quantize import quantize_dynamic
from ssmc.kernels.cpu.rotary import rotary_embedding
from ssmc.quant.rotation import largest_block


@dataclass(frozen=True)
class Jamba:
    """Sizes of a model; layers of Mamba, of attention and of experts."""

    mamba: Mamba
    heads: int
    groups: int
    head: int
    experts: int
    chosen: int
    inner: int
    attentions: int
    mixtures: int


def prompt(m: Jamba, length: int) -> Iterator[Case]:
    """The kernels of attention and of experts."""
    call = Call(m.mamba.name, length)
    yield _append(call, m, length)
    yield _attention(call, m, length)
    yield _int8_attention(call, m, length)
    yield from _mixture(call, m)


def step(m: Jamba, length: int) -> Iterator[Case]:
    """The same of a token behind `length` - 1 others."""
    call = Call(m.mamba.name, 1, m.attentions)
    yield scan_step(Call(m.mamba.name, 1, m.mamba.layers), m.mamba, normed=True)
    yield _append_step(call, m, length)
    yield _quantize_step(call, m, length)
    yield _attention(call, m, length)
    yield _int8_attention(call, m, length)
    yield from _mixture(Call(m.mamba.name, 1, m.mixtures), m)


def llama(name: str, heads: int, head: int, inner: int, layers: int, length: int) -> Iterator[Case]:
    """What Llama has that Jamba has not, of a prompt and of a token."""
    for call in (Call(name, length), Call(name, 1, layers)):
        yield _rotary(call, heads, head)
        yield gate(call, inner, 1)


# -- attention --------------------------------------------------------------------------------


def _position(call: Call, length: int) -> torch.Tensor:
    return torch.tensor([length - call.length])


def _cache(m: Jamba, length: int) -> torch.Tensor:
    return torch.randn(1, length, m.groups, m.head)


def _looking(call: Call, m: Jamba, length: int) -> dict[str, int]:
    """Work of tokens that look at themselves and at all before."""
    pairs = call.length * (2 * length - call.length + 1) // 2 * m.heads
    return {"floats": 2 * pairs * m.head, "exponentials": pairs}


def _attention(call: Call, m: Jamba, length: int) -> Case:
    def inputs() -> tuple[Any, ...]:
        q = torch.randn(1, call.length, m.heads, m.head)
        return q, _cache(m, length), _cache(m, length), _position(call, length)

    shape = f"{length} × {m.heads} × {m.head}"
    return call.case("attention", shape, attention, inputs, **_looking(call, m, length))


def _int8_attention(call: Call, m: Jamba, length: int) -> Case:
    def inputs() -> tuple[Any, ...]:
        q = torch.randn(1, call.length, m.heads, m.head)
        k, v = (quantize_dynamic(_cache(m, length)) for _ in range(2))
        return q, *k, *v, _position(call, length)

    shape = f"{length} × {m.heads} × {m.head}"
    return call.case("attention, int8 cache", shape, int8_attention, inputs,
                     **_looking(call, m, length))  # fmt: skip


def _append(call: Call, m: Jamba, length: int) -> Case:
    def inputs() -> tuple[Any, ...]:
        return _cache(m, length), _cache(m, call.length), _position(call, length)

    unread = 4 * call.length * m.groups * m.head  # of the cache, rows that are replaced
    return call.case("cache", f"{m.groups} × {m.head}", cache_append, inputs, unread=unread)


def _append_step(call: Call, m: Jamba, length: int) -> Case:
    def inputs() -> tuple[Any, ...]:
        return _cache(m, length), _cache(m, 1), _position(call, length)

    untouched = 4 * (2 * length - 1) * m.groups * m.head  # it is operand and result
    return call.case("cache", f"{m.groups} × {m.head}", cache_append_step, inputs,
                     unread=untouched)  # fmt: skip


def _quantize_step(call: Call, m: Jamba, length: int) -> Case:
    def inputs() -> tuple[Any, ...]:
        return *quantize_dynamic(_cache(m, length)), _cache(m, 1), _position(call, length)

    untouched = (2 * length - 1) * m.groups * (m.head + 4)
    return call.case("cache, quantised", f"{m.groups} × {m.head}", cache_quantize_step, inputs,
                     unread=untouched, floats=QUANTISE * m.groups * m.head)  # fmt: skip


def _rotary(call: Call, heads: int, head: int) -> Case:
    def inputs() -> tuple[Any, ...]:
        x = torch.randn(1, call.length, heads, head)
        return x, torch.rand(head // 2), torch.tensor([0])

    floats = 2 * call.length * heads * head
    return call.case("rotary positions", f"{heads} × {head}", rotary_embedding, inputs,
                     floats=floats)  # fmt: skip


# -- experts ----------------------------------------------------------------------------------


def gate(call: Call, inner: int, rows: int) -> Case:
    """SiLU of a gate times what it gates, rotated and rounded; `rows` a token."""
    block = largest_block(inner)

    def inputs() -> tuple[Any, ...]:
        return *torch.randn(2, 1, call.length, rows, inner), block

    count = call.length * rows
    floats = count * (inner * (1 + QUANTISE) + rotating(inner, block))
    return call.case("gate, rotate, quantise", f"{rows} × {inner}", silu_mul_quantize, inputs,
                     floats=floats, exponentials=count * inner)  # fmt: skip


def _mixture(call: Call, m: Jamba) -> Iterator[Case]:
    yield _router(call, m)
    yield _experts(call, m, 2 * m.inner, m.mamba.width, summed=False)
    yield gate(call, m.inner, m.chosen)
    yield _experts(call, m, m.mamba.width, m.inner, summed=True)


def _router(call: Call, m: Jamba) -> Case:
    def inputs() -> tuple[Any, ...]:
        return torch.randn(1, call.length, m.experts), m.chosen

    return call.case("router", f"{m.experts}", softmax_top_k, inputs,
                     exponentials=call.length * m.experts)  # fmt: skip


def _experts(call: Call, m: Jamba, n: int, k: int, summed: bool) -> Case:
    def inputs() -> tuple[Any, ...]:
        w, w_scale = (t.unflatten(0, (m.experts, n)) for t in weight(m.experts * n, k))
        index = torch.rand(1, call.length, m.experts).topk(m.chosen).indices
        rows = (m.chosen, k) if summed else (k,)
        x = quantize_dynamic(torch.randn(1, call.length, *rows))
        weights = (torch.rand(1, call.length, m.chosen),) if summed else ()
        return *x, w, w_scale, index, *weights

    choices = call.length * m.chosen
    unread = max(0, m.experts - choices) * n * (k + 4)
    name = "experts, summed" if summed else "experts"
    return call.case(name, f"{m.chosen} of {m.experts} × {n} × {k}",
                     int8_expert_linear_sum if summed else int8_expert_linear, inputs,
                     products=choices * n * k, floats=choices * n if summed else 0,
                     unread=unread)  # fmt: skip
