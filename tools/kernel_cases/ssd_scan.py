"""The scan of Mamba-2: prompts of 512 and 2048, and of 2.7B one step of 1 and 64 sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernel_cases.case import Case, Inputs
from kernel_cases.operands import integers, scales
from ssmc import ops
from ssmc.kernels.ssd_scan import int8_ssd_scan
from ssmc.kernels.ssd_step import ssd_scan_step

WIDTH, RANK = 64, 128
HEADS = {"2.7b": 80, "130m": 24}


_MANY: tuple[dict[str, Any], ...] = (
    {"rows": 8, "num_warps": 1},
    {"rows": 16, "num_warps": 1},
    {"rows": 16, "num_warps": 2},
    {"rows": 32, "num_warps": 2},
    {"rows": 32, "num_warps": 4},
    {"rows": 64, "num_warps": 4},
    {"rows": 64, "num_warps": 8},
)


def _scales(device: torch.device, *shape: int) -> Tensor:
    return scales(*shape, device=device, least=0.01, most=0.03)


def _heads(device: torch.device, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """A, D and dt_bias, distributed as in a fresh model: A in -16..-1, dt in 0.001..0.1."""
    dt = torch.exp(-2.3 - 4.6 * torch.rand(heads, device=device))
    A = -1 - 15 * torch.rand(heads, device=device)
    return A, torch.randn(heads, device=device), torch.log(torch.expm1(dt))


def _x_and_dt(device: torch.device, batch: int, length: int, heads: int) -> tuple[Tensor, ...]:
    projected = 2 * heads * WIDTH + 2 * RANK + heads  # what in_proj gives: z, x, B, C and dt
    x = integers(batch, length, heads, WIDTH, device=device)
    dt = integers(batch, length, projected, device=device)[..., -heads:]
    return x, _scales(device, heads, WIDTH), dt, _scales(device, heads)


def _prompt(length: int, heads: int) -> Inputs:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        A, D, dt_bias = _heads(device, heads)
        B, C = (integers(1, length, 1, RANK, device=device) for _ in range(2))
        B_scale, C_scale = (_scales(device, 1, length, 1, 1) for _ in range(2))
        state = torch.randn(1, heads, WIDTH, RANK, device=device)
        operands = (*_x_and_dt(device, 1, length, heads), A, B, B_scale, C, C_scale)
        return (*operands, D, dt_bias, state)

    return inputs


def _step(batch: int, heads: int, state_type: torch.dtype) -> Inputs:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        A, D, dt_bias = _heads(device, heads)
        BC = torch.randn(batch, 1, 2 * RANK, device=device)
        state = torch.randn(batch, heads, WIDTH, RANK, device=device).to(state_type)
        return (*_x_and_dt(device, batch, 1, heads), A, BC, 1, D, dt_bias, state)

    return inputs


def _prompt_case(size: str, length: int, *configs: dict[str, Any]) -> Case:
    chunk, heads = 64, HEADS[size]
    inner = heads * WIDTH
    return Case(
        f"ssd_scan {size} L={length}",
        ops.int8_ssd_scan,
        int8_ssd_scan,
        _prompt(length, heads),
        bytes=length * (5 * inner + heads + 2 * RANK + 8) + 8 * inner * RANK,
        # In chunks: C B', the products inside, with the state before, and into the state.
        operations=2.0 * length * heads * (chunk * RANK + chunk * WIDTH + 2 * WIDTH * RANK),
        unit="bf16",
        error=5e-4,
        configs=({}, *configs),
    )


def _step_case(size: str, batch: int, *configs: dict[str, Any], bits: int = 32) -> Case:
    heads = HEADS[size]
    inner = heads * WIDTH
    return Case(
        f"ssd_scan_step {size} batch={batch}" + (" bf16" if bits == 16 else ""),
        ops.ssd_scan_step,
        ssd_scan_step,
        _step(batch, heads, torch.bfloat16 if bits == 16 else torch.float32),
        bytes=batch * (2 * bits // 8 * inner * RANK + 5 * inner + heads + 8 * RANK),
        error=5e-6 if bits == 32 else 3e-4,
        configs=({}, *configs),
    )


CASES: tuple[Case, ...] = (
    _prompt_case(
        "2.7b", 2048, {"segments": 2}, {"segments": 4}, {"split": False}, {"asynchronous": False}
    ),
    _prompt_case("2.7b", 512, {"segments": 1}, {"segments": 4}, {"asynchronous": False}),
    _prompt_case("130m", 2048, {"segments": 4}, {"segments": 11}, {"asynchronous": False}),
    _step_case(
        "2.7b",
        1,
        {"rows": 4, "num_warps": 1},
        {"rows": 8, "num_warps": 2},
        {"rows": 8, "num_warps": 4},
        {"rows": 16, "num_warps": 1},
        {"rows": 16, "num_warps": 4},
    ),
    _step_case("2.7b", 64, *_MANY),
    _step_case("2.7b", 64, *_MANY, bits=16),
)
