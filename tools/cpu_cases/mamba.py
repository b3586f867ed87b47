"""Layers of Mamba-1, and the scan of Jamba's, which has norms in front."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpu_cases.case import Case, integers, scales, weight
from cpu_cases.shared import (
    Call,
    conv,
    in_proj,
    norm,
    out_proj,
    product,
    rotation,
    split,
)
from ssmc.kernels.cpu.embedding import int8_embedding
from ssmc.kernels.cpu.linear import int8_linear_quantize
from ssmc.kernels.cpu.scan_step import normed_selective_scan_step, selective_scan_step
from ssmc.kernels.cpu.selective_scan import int8_selective_scan

A_STATE = 4  # float operations: dt A, dt u B, decay and add, C h and add


@dataclass(frozen=True)
class Mamba:
    """Sizes of a model, as in its configuration."""

    name: str
    width: int
    inner: int
    rank: int
    states: int
    layers: int
    vocabulary: int


def prompt(m: Mamba, length: int) -> Iterator[Case]:
    """The kernels of a layer."""
    call = Call(m.name, length)
    yield norm(call, m.width)
    yield in_proj(call, 2 * m.inner, m.width)
    yield conv(call, 2 * m.inner, m.inner, m.inner)
    yield split(call, "x_proj, quantised", [m.rank, m.states, m.states], m.inner)
    yield product(call, "dt_proj, rounded", m.inner, m.rank, int8_linear_quantize,
                  lambda: scales(m.inner))  # fmt: skip
    yield _scan(call, m)
    yield rotation(call, m.inner)
    yield out_proj(call, m.width, m.inner)


def step(m: Mamba) -> Iterator[Case]:
    """The kernels of a layer, and what is behind and in front of all."""
    call, once = Call(m.name, 1, m.layers), Call(m.name, 1)
    yield _embedding(once, m)
    yield norm(call, m.width)
    yield in_proj(call, 2 * m.inner, m.width)
    yield conv(call, 2 * m.inner, m.inner, m.inner)
    yield product(call, "x_proj", m.rank + 2 * m.states, m.inner)
    yield scan_step(call, m)
    yield rotation(call, m.inner)
    yield out_proj(call, m.width, m.inner)
    yield product(once, "head", m.vocabulary, m.width)


def _embedding(call: Call, m: Mamba) -> Case:
    def inputs() -> tuple[Any, ...]:
        return torch.randint(m.vocabulary, (1, call.length)), *weight(m.vocabulary, m.width)

    unread = (m.vocabulary - call.length) * (m.width + 4)
    return call.case("embedding", f"{m.width}", int8_embedding, inputs, unread=unread,
                     floats=call.length * m.width)  # fmt: skip


def _parameters(m: Mamba) -> tuple[Tensor, Tensor, Tensor]:
    """A, D and dt_bias as in a fresh model: A is -1, -2, ... in every channel, dt 0.001 to 0.1."""
    A = -torch.arange(1.0, m.states + 1).repeat(m.inner, 1)
    dt = torch.exp(-2.3 - 4.6 * torch.rand(m.inner))
    return A, torch.randn(m.inner), torch.log(torch.expm1(dt))


def _work(call: Call, m: Mamba) -> dict[str, int]:
    """Of the recurrence, its step sizes and its gate."""
    channels = call.length * m.inner
    return {
        "floats": A_STATE * channels * m.states,
        "exponentials": channels * (m.states + 2),
    }


def _scan(call: Call, m: Mamba) -> Case:
    def inputs() -> tuple[Any, ...]:
        A, D, bias = _parameters(m)
        u, dt = integers(2, 1, call.length, m.inner)
        z = integers(1, call.length, 2 * m.inner)[..., m.inner :]
        B, C = integers(2, 1, call.length, m.states)
        B_scale, C_scale = scales(2, 1, call.length, 1)
        gates = (D, z, scales(m.inner), bias, torch.zeros(1, m.inner, m.states))
        return u, scales(m.inner), dt, scales(m.inner), A, B, B_scale, C, C_scale, *gates

    return call.case("selective scan, gate", f"{m.inner} × {m.states}", int8_selective_scan,
                     inputs, **_work(call, m))  # fmt: skip


def scan_step(call: Call, m: Mamba, normed: bool = False) -> Case:
    """dt_proj, scan and gate of a token, behind the norms that Jamba has."""
    weights = [torch.rand(n) for n in (m.rank, m.states, m.states)]
    norms = (*weights, 1e-6) if normed else ()

    def inputs() -> tuple[Any, ...]:
        A, D, bias = _parameters(m)
        x = torch.randn(1, 1, m.rank + 2 * m.states)
        u, z = integers(1, 1, 2 * m.inner).split([m.inner, m.inner], -1)
        linear = (*weight(m.inner, m.rank), None, scales(m.inner))
        scan = (u, scales(m.inner), A, D, z, scales(m.inner), bias)
        return x, *norms, *linear, *scan, torch.zeros(1, m.inner, m.states), True

    run = normed_selective_scan_step if normed else selective_scan_step
    name = ("norms, " if normed else "") + "dt_proj, scan step, gate"
    return call.case(name, f"{m.inner} × {m.states}", run, inputs,
                     products=m.inner * m.rank, **_work(call, m))  # fmt: skip
