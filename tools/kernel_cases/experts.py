"""Experts: 16 large ones, 2 a token, as in Jamba, and 64 small ones, 8 a token."""

from __future__ import annotations

from typing import Any

import torch

from kernel_cases.case import Case, Inputs
from kernel_cases.operands import integers, scales
from ssmc import ops
from ssmc.kernels.experts import int8_expert_linear

SIZES = {"jamba": (16, 2, 8192, 4096), "small": (64, 8, 1024, 2048)}  # E, k, rows, columns


def _inputs(size: str, length: int) -> Inputs:
    experts, each, rows, width = SIZES[size]

    def inputs(device: torch.device) -> tuple[Any, ...]:
        chosen = torch.rand(1, length, experts, device=device).topk(each).indices
        x = integers(1, length, width, device=device)
        w = integers(experts, rows, width, device=device)
        x_scale = scales(1, length, 1, device=device, least=0.01, most=0.03)
        w_scale = scales(experts, rows, 1, device=device, least=0.01, most=0.03)
        return x, x_scale, w, w_scale, chosen

    return inputs


def _case(size: str, length: int) -> Case:
    experts, each, rows, width = SIZES[size]
    choices = length * each
    read = min(experts, choices) * rows * (width + 4)
    return Case(
        f"experts {size} {length} tokens",
        ops.int8_expert_linear,
        int8_expert_linear,
        _inputs(size, length),
        bytes=read + length * width + 4 * choices * rows,
        operations=2 * choices * rows * width,
        error=0.0,
    )


CASES: tuple[Case, ...] = tuple(_case(size, n) for size in SIZES for n in (1, 4, 64, 1024))
