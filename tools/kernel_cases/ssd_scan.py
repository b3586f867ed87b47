"""The scan of Mamba-2 2.7B: prompts of 512 and 2048, and one step of 1 and 64 sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernel_cases.case import Case, Inputs
from kernel_cases.operands import integers, scales
from ssmc import ops
from ssmc.kernels.ssd_scan import int8_ssd_scan
from ssmc.kernels.ssd_step import ssd_scan_step

HEADS, WIDTH, RANK = 80, 64, 128
INNER = HEADS * WIDTH
PROJECTED = 2 * INNER + 2 * RANK + HEADS  # what in_proj gives: z, x, B, C and dt
STATE = INNER * RANK


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


def _heads(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A, D and dt_bias, distributed as in a fresh model: A in -16..-1, dt in 0.001..0.1."""
    dt = torch.exp(-2.3 - 4.6 * torch.rand(HEADS, device=device))
    A = -1 - 15 * torch.rand(HEADS, device=device)
    return A, torch.randn(HEADS, device=device), torch.log(torch.expm1(dt))


def _x_and_dt(device: torch.device, batch: int, length: int) -> tuple[Tensor, ...]:
    x = integers(batch, length, HEADS, WIDTH, device=device)
    dt = integers(batch, length, PROJECTED, device=device)[..., -HEADS:]
    return x, _scales(device, HEADS, WIDTH), dt, _scales(device, HEADS)


def _prompt(length: int) -> Inputs:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        A, D, dt_bias = _heads(device)
        B, C = (integers(1, length, 1, RANK, device=device) for _ in range(2))
        B_scale, C_scale = (_scales(device, 1, length, 1, 1) for _ in range(2))
        state = torch.randn(1, HEADS, WIDTH, RANK, device=device)
        operands = (*_x_and_dt(device, 1, length), A, B, B_scale, C, C_scale)
        return (*operands, D, dt_bias, state)

    return inputs


def _step(batch: int, state_type: torch.dtype) -> Inputs:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        A, D, dt_bias = _heads(device)
        BC = torch.randn(batch, 1, 2 * RANK, device=device)
        state = torch.randn(batch, HEADS, WIDTH, RANK, device=device).to(state_type)
        return (*_x_and_dt(device, batch, 1), A, BC, 1, D, dt_bias, state)

    return inputs


def _prompt_case(length: int, *configs: dict[str, Any]) -> Case:
    chunk = 64
    return Case(
        f"ssd_scan 2.7b L={length}",
        ops.int8_ssd_scan,
        int8_ssd_scan,
        _prompt(length),
        bytes=length * (5 * INNER + HEADS + 2 * RANK + 8) + 8 * STATE,
        # In chunks: C B', the products inside, with the state before, and into the state.
        operations=2.0 * length * HEADS * (chunk * RANK + chunk * WIDTH + 2 * WIDTH * RANK),
        unit="bf16",
        error=5e-4,
        configs=({}, *configs),
    )


def _step_case(batch: int, *configs: dict[str, Any], bits: int = 32) -> Case:
    return Case(
        f"ssd_scan_step 2.7b batch={batch}" + (" bf16" if bits == 16 else ""),
        ops.ssd_scan_step,
        ssd_scan_step,
        _step(batch, torch.bfloat16 if bits == 16 else torch.float32),
        bytes=batch * (2 * bits // 8 * STATE + 5 * INNER + HEADS + 8 * RANK),
        error=5e-6 if bits == 32 else 3e-4,
        configs=({}, *configs),
    )


CASES: tuple[Case, ...] = (
    _prompt_case(
        2048,
        {"channels": 32},
        {"channels": 32, "state_stages": 4},
        {"chunk": 128, "together": 5},
        {"together": 4},
        {"split": False},
    ),
    _prompt_case(
        512,
        {"channels": 32},
        {"channels": 16},
        {"chunk": 128},
        {"split": False},
    ),
    _step_case(
        1,
        {"rows": 4, "num_warps": 1},
        {"rows": 8, "num_warps": 2},
        {"rows": 8, "num_warps": 4},
        {"rows": 16, "num_warps": 1},
        {"rows": 16, "num_warps": 4},
    ),
    _step_case(64, *_MANY),
    _step_case(64, *_MANY, bits=16),
)
