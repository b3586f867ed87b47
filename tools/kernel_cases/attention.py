"""Attention of Jamba's size (32 heads, 8 of keys, 128 channels) over int8 and float caches."""

from __future__ import annotations

from typing import Any

import torch

from kernel_cases.case import Case, Inputs
from ssmc import ops
from ssmc.kernels.attention import attention, int8_attention
from ssmc.kernels.cache import cache_append_step
from ssmc.kernels.rotary import rotary_embedding

HEADS, GROUPS, WIDTH = 32, 8, 128


def _operands(
    device: torch.device, batch: int, length: int, room: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.randn(batch, length, HEADS, WIDTH, device=device)
    k, v = (torch.randn(batch, room, GROUPS, WIDTH, device=device) for _ in range(2))
    position = torch.full((batch,), room - length, device=device)
    return q, k, v, position


def _float(batch: int, length: int, room: int) -> Inputs:
    return lambda device: _operands(device, batch, length, room)


def _int8(batch: int, length: int, room: int) -> Inputs:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        q, k, v, position = _operands(device, batch, length, room)
        return q, *ops.quantize_dynamic(k), *ops.quantize_dynamic(v), position

    return inputs


def _rotary(batch: int, length: int) -> Inputs:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        x = torch.randn(batch, length, HEADS, WIDTH, device=device)
        frequencies = 10000 ** -torch.linspace(0, 1, WIDTH // 2, device=device)
        return x, frequencies, torch.full((batch,), 100, device=device)

    return inputs


def _append(batch: int, room: int) -> Inputs:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        cache = torch.randint(-127, 128, (batch, room, GROUPS, WIDTH), dtype=torch.int8).to(device)
        x = torch.randint(-127, 128, (batch, 1, GROUPS, WIDTH), dtype=torch.int8).to(device)
        return cache, x, torch.full((batch,), room // 2, device=device)

    return inputs


def _case(batch: int, length: int, room: int, bits: int) -> Case:
    name = (
        f"attention {'int8' if bits == 8 else 'float32'} batch {batch} length {length} rows {room}"
    )
    row = GROUPS * (2 * WIDTH * bits // 8 + (8 if bits == 8 else 0))
    queries = 2 * 4 * batch * length * HEADS * WIDTH
    seen = batch * HEADS * length * (room - (length - 1) / 2)
    return Case(
        name,
        ops.int8_attention if bits == 8 else ops.attention,
        int8_attention if bits == 8 else attention,
        (_int8 if bits == 8 else _float)(batch, length, room),
        bytes=batch * room * row + queries,
        operations=3 * 2 * 2 * seen * WIDTH,  # both products, each in three parts of tf32
        unit="tf32",
        error=1e-5,
    )


CASES: tuple[Case, ...] = (
    *(_case(1, 1, room, bits) for room in (512, 8192) for bits in (8, 32)),
    _case(64, 1, 2048, 8),
    _case(1, 512, 512, 8),
    _case(1, 2048, 2048, 32),
    Case(
        "rotary embedding batch 1 length 2048",
        ops.rotary_embedding,
        rotary_embedding,
        _rotary(1, 2048),
        bytes=2 * 4 * 2048 * HEADS * WIDTH,
        error=1e-5,
    ),
    Case(
        "cache append batch 64",
        ops.cache_append_step,
        cache_append_step,
        _append(64, 2048),
        bytes=2 * 64 * GROUPS * WIDTH,
    ),
)
