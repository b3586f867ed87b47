"""Layers of Mamba-2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cpu_cases.case import Case, integers, scales
from cpu_cases.shared import (
    NORMALISE,
    QUANTISE,
    Call,
    conv,
    in_proj,
    norm,
    out_proj,
    rotating,
)
from ssmc.kernels.cpu.norm import gated_norm_quantize
from ssmc.kernels.cpu.ssd_scan import int8_ssd_scan
from ssmc.kernels.cpu.steps import ssd_scan_step
from ssmc.quant.rotation import largest_block

A_STATE = 3  # float operations: update B, decay and add, C h and add


@dataclass(frozen=True)
class Mamba2:
    """Sizes of a model with one group, as in its configuration."""

    name: str
    width: int
    heads: int
    head: int
    states: int
    layers: int

    @property
    def inner(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head


def prompt(m: Mamba2, length: int) -> Iterator[Case]:
    """The kernels of a layer that Mamba-1 does not have in another size."""
    call = Call(m.name, length)
    yield from _around(call, m)
    yield _scan(call, m)


def step(m: Mamba2) -> Iterator[Case]:
    """The same of a token."""
    call = Call(m.name, 1, m.layers)
    yield from _around(call, m)
    yield _scan_step(call, m)


def _around(call: Call, m: Mamba2) -> Iterator[Case]:
    channels = m.inner + 2 * m.states
    yield norm(call, m.width)
    yield in_proj(call, m.inner + channels + m.heads, m.width)
    yield conv(call, m.inner + channels, channels, m.inner)
    yield _gated_norm(call, m)
    yield out_proj(call, m.width, m.inner)


def _gated_norm(call: Call, m: Mamba2) -> Case:
    n, block = m.inner, largest_block(m.inner)

    def inputs() -> tuple[Any, ...]:
        gate = integers(1, call.length, 2 * n)[..., n:]
        norm = (torch.rand(n), 1e-5, None, False, block)
        return torch.randn(1, call.length, n), gate, scales(n), *norm

    floats = call.length * (n * (1 + NORMALISE + QUANTISE) + rotating(n, block))
    return call.case("gate, norm, rotate, quantise", f"{n}", gated_norm_quantize, inputs,
                     floats=floats, exponentials=call.length * n)  # fmt: skip


def _heads(m: Mamba2) -> tuple[Any, ...]:
    """A, D and dt_bias."""
    return -1 - 15 * torch.rand(m.heads), torch.randn(m.heads), torch.full((m.heads,), -4.6)


def _tokens(call: Call, m: Mamba2) -> tuple[Any, ...]:
    """x and dt with their scales."""
    x, dt = integers(1, call.length, m.heads, m.head), integers(1, call.length, m.heads)
    return x, scales(m.heads, m.head), dt, scales(m.heads)


def _work(call: Call, m: Mamba2) -> dict[str, int]:
    """Of the recurrence, its decays and step sizes."""
    return {
        "floats": A_STATE * call.length * m.inner * m.states,
        "exponentials": 2 * call.length * m.heads,
    }


def _state(m: Mamba2) -> torch.Tensor:
    return torch.zeros(1, m.heads, m.head, m.states)


def _scan(call: Call, m: Mamba2) -> Case:
    def inputs() -> tuple[Any, ...]:
        A, D, bias = _heads(m)
        B, C = integers(2, 1, call.length, 1, m.states)
        B_scale, C_scale = scales(2, 1, call.length, 1, 1)
        return *_tokens(call, m), A, B, B_scale, C, C_scale, D, bias, _state(m)

    return call.case("SSD scan", f"{m.heads} × {m.head} × {m.states}", int8_ssd_scan, inputs,
                     **_work(call, m))  # fmt: skip


def _scan_step(call: Call, m: Mamba2) -> Case:
    def inputs() -> tuple[Any, ...]:
        A, D, bias = _heads(m)
        BC = torch.randn(1, 1, 2 * m.states)
        return *_tokens(call, m), A, BC, 1, D, bias, _state(m)

    shape = f"{m.heads} × {m.head} × {m.states}"
    return call.case("SSD scan step", shape, ssd_scan_step, inputs, **_work(call, m))
