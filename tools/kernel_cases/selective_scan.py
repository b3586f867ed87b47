"""The scan of Mamba-1 2.8B and 130m: prompts of 512 and 2048, a step of 1 and 64 sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernel_cases.case import Case, Inputs
from kernel_cases.operands import integers, scales
from ssmc import ops
from ssmc.kernels.selective_scan import int8_selective_scan
from ssmc.kernels.selective_step import selective_scan_step
from ssmc.quant.formats import quantize_weight

STATES = 16
WIDTHS = {"2.8b": (5120, 160), "130m": (1536, 48)}  # d_inner, dt_rank
_LANES: tuple[dict[str, Any], ...] = (
    {"lanes": 4},
    {"lanes": 4, "block_t": 32},
    {"lanes": 8},
    {"lanes": 8, "block_t": 32},
    {"lanes": 16},
)


def _scales(device: torch.device, *shape: int) -> Tensor:
    return scales(*shape, device=device, least=0.01, most=0.03)


def _channels(device: torch.device, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """A, D and dt_bias as in a fresh model: A is -1..-16 in every channel, dt in 0.001..0.1."""
    dt = torch.exp(-2.3 - 4.6 * torch.rand(width, device=device))
    A = -torch.arange(1.0, STATES + 1, device=device).repeat(width, 1)
    return A, torch.randn(width, device=device), torch.log(torch.expm1(dt))


def _prompt(width: int, length: int) -> Inputs:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        A, D, dt_bias = _channels(device, width)
        u, dt = (integers(1, length, width, device=device) for _ in range(2))
        z = integers(1, length, 2 * width, device=device)[..., width:]
        u_scale, dt_scale, z_scale = (_scales(device, width) for _ in range(3))
        B, C = (integers(1, length, STATES, device=device) for _ in range(2))
        B_scale, C_scale = (_scales(device, 1, length, 1) for _ in range(2))
        state = torch.randn(1, width, STATES, device=device)
        operands = (u, u_scale, dt, dt_scale, A, B, B_scale, C, C_scale)
        return (*operands, D, z, z_scale, dt_bias, state)

    return inputs


def _step(width: int, rank: int, batch: int, state_type: torch.dtype) -> Inputs:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        A, D, dt_bias = _channels(device, width)
        x_proj = torch.randn(batch, 1, rank + 2 * STATES, device=device)
        weight, weight_scale = quantize_weight(torch.randn(width, rank, device=device) / rank**0.5)
        u = integers(batch, 1, width, device=device)
        z = integers(batch, 1, 2 * width, device=device)[..., width:]
        u_scale, dt_scale, z_scale = (_scales(device, width) for _ in range(3))
        state = torch.randn(batch, width, STATES, device=device).to(state_type)
        projection = (x_proj, weight, weight_scale, None, dt_scale)
        return (*projection, u, u_scale, A, D, z, z_scale, dt_bias, state, True)

    return inputs


def _parameter_bytes(width: int) -> int:
    """A, D, dt_bias and the static scales of u, dt and z."""
    return 4 * width * (STATES + 5)


def _prompt_case(model: str, length: int) -> Case:
    width, _ = WIDTHS[model]
    tokens = length * (2 * (STATES + 4) + width * (3 + 4))  # B, C; u, dt, z in and y out
    states = 2 * 4 * width * STATES
    return Case(
        f"selective scan {model} {length}",
        ops.int8_selective_scan,
        int8_selective_scan,
        _prompt(width, length),
        bytes=tokens + states + _parameter_bytes(width),
        # A channel and position: N decays, and one exponential each of softplus and gate.
        operations=length * width * (STATES + 2),
        unit="exp",
        configs=_LANES,
    )


def _step_case(model: str, batch: int, bits: int = 32) -> Case:
    width, rank = WIDTHS[model]
    weight = width * (rank + 4)
    sequences = batch * (4 * (rank + 2 * STATES) + width * (2 + 4 + 2 * bits // 8 * STATES))
    single = [{"block_d": d, "num_warps": w} for d, w in ((8, 2), (8, 4), (16, 4), (32, 4))]
    many = [
        {"block_d": d, "sequences": s, "num_warps": w}
        for d, s, w in ((32, 16, 4), (32, 16, 8), (16, 16, 4), (64, 16, 8), (32, 32, 8), (16, 1, 4))
    ]
    return Case(
        f"selective scan step {model} batch {batch}" + (" bf16" if bits == 16 else ""),
        ops.selective_scan_step,
        selective_scan_step,
        _step(width, rank, batch, torch.bfloat16 if bits == 16 else torch.float32),
        bytes=weight + sequences + _parameter_bytes(width),
        operations=batch * width * (STATES + 2),
        unit="exp",
        error=1e-5 if bits == 32 else 3e-4,
        configs=tuple(single if batch == 1 else many),
    )


CASES: tuple[Case, ...] = (
    _prompt_case("2.8b", 512),
    _prompt_case("2.8b", 2048),
    _prompt_case("130m", 512),
    _step_case("2.8b", 1),
    _step_case("2.8b", 64),
    _step_case("2.8b", 64, bits=16),
    _step_case("130m", 1),
    _step_case("130m", 64),
)
