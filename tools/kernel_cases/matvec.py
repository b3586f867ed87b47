"""Decoding's linear layers at the sizes of published models, batch 1 (and 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernel_cases.case import Case
from kernel_cases.operands import integers, scales, weight, weight_bytes
from ssmc import ops
from ssmc.kernels.matvec import int8_linear, int8_linear_add, norm_linear_step
from ssmc.kernels.matvec_conv import in_proj_conv_step

ERROR = 5e-3
"""Of a product whose row the kernel rounds: a value between two integers may go to either."""
FLIPS = 0.02

Configs = tuple[dict[str, Any], ...]


def _configs(*sweep: tuple[int, int] | tuple[int, int, int]) -> Configs:
    """Launch parameters from (rows of a program, warps[, limit of registers])."""
    names = ("block_n", "num_warps", "maxnreg")
    return tuple(dict(zip(names, values, strict=False)) for values in sweep)


def _floats(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device)


def _bits(bits: int) -> str:
    return "" if bits == 8 else " int4"


def _in_proj(
    name: str,
    n: int,
    k: int,
    start: int,
    channels: int,
    width: int,
    configs: Configs,
    bits: int = 8,
    rows: int = 1,
    folded: bool = True,
) -> Case:
    """Behind a norm whose weight is folded into that of in_proj, as compiled models have it."""

    def inputs(device: torch.device) -> tuple[Any, ...]:
        return (
            _floats(rows, 1, k, device=device),
            None if folded else _floats(k, device=device),
            1e-5,
            *weight(n, k, bits, device),
            None,
            scales(n, device=device) * k**0.5,
            start,
            integers(channels, 4, device=device),
            scales(channels, 1, device=device),
            _floats(channels, device=device),
            integers(rows, 3, channels, device=device),
            "silu",
            scales(width, device=device),
        )

    once = weight_bytes(n, k, bits) + 4 * n + channels * (4 + 4 + 4) + 4 * width
    once += 0 if folded else 4 * k
    each = 4 * k + n + 6 * channels + width + 4 * (channels - width)
    return Case(
        f"in_proj_conv_step {name}{_bits(bits)} {rows}",
        ops.in_proj_conv_step,
        in_proj_conv_step,
        inputs,
        once + rows * each,
        2.0 * rows * n * k,
        error=ERROR,
        flips=FLIPS,
        configs=configs,
    )


def _norm(name: str, n: int, k: int, configs: Configs, bits: int = 8, rows: int = 1) -> Case:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        x, norm = _floats(rows, 1, k, device=device), _floats(k, device=device)
        return x, norm, 1e-5, *weight(n, k, bits, device), None

    return Case(
        f"norm_linear_step {name}{_bits(bits)} {rows}",
        ops.norm_linear_step,
        norm_linear_step,
        inputs,
        weight_bytes(n, k, bits) + 4 * k + rows * 4 * (n + k),
        2.0 * rows * n * k,
        error=ERROR,
        configs=configs,
    )


def _linear(
    name: str,
    n: int,
    k: int,
    configs: Configs,
    bits: int = 8,
    rows: int = 1,
    added: bool = False,
) -> Case:
    """A product alone, or `added` to a residual."""

    def inputs(device: torch.device) -> tuple[Any, ...]:
        x, scale = integers(rows, 1, k, device=device), scales(device=device)
        residual = (_floats(rows, 1, n, device=device),) if added else ()
        return x, scale, *weight(n, k, bits, device), None, *residual

    operator, kernel = (
        (ops.int8_linear_add, int8_linear_add) if added else (ops.int8_linear, int8_linear)
    )
    return Case(
        f"{operator.__name__} {name}{_bits(bits)} {rows}",
        operator,
        kernel,
        inputs,
        weight_bytes(n, k, bits) + rows * (k + 4 * n * (2 if added else 1)),
        2.0 * rows * n * k,
        error=0.0 if bits == 8 else 1e-5,
        configs=configs,
    )


_WIDE = _configs((16, 4), (8, 4), (4, 4))
_SMALL = _configs((8, 4), (16, 4), (16, 2), (32, 4))

CASES: tuple[Case, ...] = (
    _in_proj("2.8b", 10240, 2560, 0, 5120, 5120, _WIDE),
    _in_proj("2.8b", 10240, 2560, 0, 5120, 5120, (), rows=4),
    _in_proj("2.8b", 10240, 2560, 0, 5120, 5120, (), rows=64),
    _in_proj("2.8b", 10240, 2560, 0, 5120, 5120, (), bits=4),
    _in_proj("2.8b", 10240, 2560, 0, 5120, 5120, (), bits=4, rows=4),
    _in_proj("130m", 3072, 768, 0, 1536, 1536, _SMALL, folded=False),
    _in_proj("130m", 3072, 768, 0, 1536, 1536, (), bits=4, folded=False),
    _in_proj("2-2.7b", 10576, 2560, 5120, 5376, 5120, ()),
    _in_proj("2-2.7b", 10576, 2560, 5120, 5376, 5120, (), bits=4),
    _linear("out_proj 2.8b", 2560, 5120, _configs((4, 4), (8, 4), (16, 4), (16, 8)), added=True),
    _linear("out_proj 2.8b", 2560, 5120, (), added=True, rows=4),
    _linear("out_proj 2.8b", 2560, 5120, (), added=True, bits=4),
    _linear("out_proj 2.8b", 2560, 5120, (), added=True, bits=4, rows=4),
    _linear("out_proj 130m", 768, 1536, _SMALL, added=True),
    _norm("head 2.8b", 50280, 2560, _WIDE),
    _norm("head 2.8b", 50280, 2560, (), bits=4),
    _norm("head 130m", 50280, 768, _configs((32, 4), (64, 4))),
    _linear("x_proj 2.8b", 192, 5120, _configs((1, 1), (2, 4), (4, 4))),
    _linear("x_proj 2.8b", 192, 5120, (), bits=4),
    _linear("x_proj 2.8b", 192, 5120, (), rows=4),
)
