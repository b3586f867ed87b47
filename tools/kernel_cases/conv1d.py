"""The convolution of prompts, and of batches of decoding as far as no other kernel does it."""

from __future__ import annotations

from typing import Any

import torch

from kernel_cases.case import Case
from kernel_cases.operands import integers
from ssmc import ops
from ssmc.kernels.conv1d import (
    int8_causal_conv1d,
    int8_causal_conv1d_quantize,
    int8_causal_conv1d_split,
)
from ssmc.quant.formats import scale_for

TAPS = 4
FLIPS = 1e-4  # the exponential in silu is good to a few units in the last place
CONFIGS = tuple(
    {"block_c": block_c, "positions": positions, "num_warps": warps}
    for block_c, positions, warps in (
        (256, 8, 1),
        (256, 16, 1),
        (256, 32, 2),
        (128, 16, 1),
        (512, 16, 4),
    )
)


def _operands(
    batch: int, length: int, channels: int, rest: int, device: torch.device
) -> tuple[Any, ...]:
    """x is the first channels of an in_proj's result that has `rest` more."""
    return (
        integers(batch, length, channels + rest, device=device)[..., :channels],
        scale_for(torch.rand(channels, device=device) + 0.5),
        integers(channels, TAPS, device=device),
        scale_for(torch.rand(channels, 1, device=device) + 0.5),
        torch.randn(channels, device=device),
        integers(batch, TAPS - 1, channels, device=device),
    )


def _bytes(batch: int, length: int, channels: int, result: int) -> float:
    states = 2 * batch * (TAPS - 1) * channels
    constants = channels * (TAPS + 4 * 4)
    return batch * length * channels * (1 + result) + states + constants


def _quantized(batch: int, length: int, channels: int, activation: str = "silu") -> Case:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        out_scale = scale_for(torch.rand(channels, device=device) * 4 + 2)
        operands = _operands(batch, length, channels, channels, device)
        return *operands, activation, out_scale

    return Case(
        f"conv quantize {activation} {channels} {batch}x{length}",
        ops.int8_causal_conv1d_quantize, int8_causal_conv1d_quantize, inputs,
        _bytes(batch, length, channels, 1), 2.0 * batch * length * channels, "exp",
        error=0.0, flips=FLIPS if activation == "silu" else 0.0,
        configs=CONFIGS if channels == 5120 and length > 1 and activation == "silu" else (),
    )  # fmt: skip


def _float(batch: int, length: int, channels: int) -> Case:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        return *_operands(batch, length, channels, channels, device), "silu"

    return Case(
        f"conv {channels} {batch}x{length}", ops.int8_causal_conv1d, int8_causal_conv1d, inputs,
        _bytes(batch, length, channels, 4), 2.0 * batch * length * channels, "exp", error=1e-6,
    )  # fmt: skip


def _split(batch: int, length: int, heads: int, head: int, groups: int, size: int) -> Case:
    channels = heads * head + 2 * groups * size

    def inputs(device: torch.device) -> tuple[Any, ...]:
        out_scale = scale_for(torch.rand(heads, head, device=device) * 4 + 2)
        operands = _operands(batch, length, channels, heads * head + heads, device)
        return *operands, "silu", out_scale, groups

    # The scales of B and C may fall on a neighbouring bfloat16, 2^-8 apart, for a few tokens.
    return Case(
        f"conv split {channels}/{groups} {batch}x{length}",
        ops.int8_causal_conv1d_split, int8_causal_conv1d_split, inputs,
        _bytes(batch, length, channels, 1), 2.0 * batch * length * channels, "exp",
        error=1e-3, flips=1e-3, configs=CONFIGS if length == 2048 else (),
    )  # fmt: skip


CASES: tuple[Case, ...] = (
    *(_quantized(1, length, 5120) for length in (512, 2048)),
    _quantized(1, 2048, 5120, "none"),
    _quantized(1, 2048, 1536),
    _quantized(64, 1, 5120),
    _float(1, 2048, 5120),
    *(_split(1, length, 80, 64, 1, 128) for length in (512, 2048)),
    _split(64, 1, 80, 64, 1, 128),
    _split(1, 1000, 80, 64, 8, 128),
)
