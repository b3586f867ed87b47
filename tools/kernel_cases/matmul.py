"""Matrix products of many rows: prompts of 512 and 2048 tokens, and batches of decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernel_cases.case import Case, Inputs
from kernel_cases.operands import integers, scales, weight, weight_bytes
from ssmc import ops
from ssmc.kernels.matmul import int8_linear, int8_linear_add, int8_linear_quantize
from ssmc.kernels.matmul_int4 import int4_linear
from ssmc.kernels.matmul_split import int8_linear_split
from ssmc.kernels.tiles import Tiling
from ssmc.ops.int4 import int4_linear as int4_reference
from ssmc.quant.formats import bf16_up

Configs = tuple[dict[str, Any], ...]


def _operands(
    m: int, n: int, k: int, device: torch.device, bits: int = 8
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, x_scale = integers(1, m, k, device=device), scales(1, m, 1, device=device)
    return x, x_scale, *weight(n, k, bits, device)


def _bytes(m: int, n: int, k: int, result: float, bits: int = 8) -> float:
    return m * k + weight_bytes(n, k, bits) + 4 * m + m * n * result


def _linear(name: str, m: int, n: int, k: int, configs: Configs = ()) -> Case:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        return _operands(m, n, k, device)

    size = _bytes(m, n, k, 4)
    return Case(
        f"linear {name} {m}", ops.int8_linear, int8_linear, inputs, size, 2.0 * m * n * k,
        error=0.0, configs=configs,
    )  # fmt: skip


def _quantize(name: str, m: int, n: int, k: int, configs: Configs = (), bits: int = 8) -> Case:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        # About the spread of the result over 50, so that most of it is not clamped.
        out_scale = bf16_up(torch.rand(n, device=device) * 1e-2 + 1e-2) * (k**0.5 / 8)
        return *_operands(m, n, k, device, bits), None, out_scale

    size = _bytes(m, n, k, 1, bits) + 4 * n
    return Case(
        f"quantize {name} {m} w{bits}", ops.int8_linear_quantize, int8_linear_quantize, inputs,
        size, 2.0 * m * n * k, flips=0.0 if bits == 8 else 1e-3, configs=configs,
    )  # fmt: skip


def _add(name: str, m: int, n: int, k: int, configs: Configs = (), bits: int = 8) -> Case:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        return *_operands(m, n, k, device, bits), None, torch.randn((1, m, n), device=device)

    size = _bytes(m, n, k, 8, bits)
    return Case(
        f"add {name} {m} w{bits}", ops.int8_linear_add, int8_linear_add, inputs, size,
        2.0 * m * n * k, error=0.0 if bits == 8 else 1e-6, configs=configs,
    )  # fmt: skip


def _split(name: str, m: int, sizes: list[int], k: int, configs: Configs = ()) -> Case:
    n = sum(sizes)

    def inputs(device: torch.device) -> tuple[Any, ...]:
        return *_operands(m, n, k, device), None, sizes

    return Case(
        f"split {name} {m}", ops.int8_linear_split, int8_linear_split, inputs,
        _bytes(m, n, k, 1), 2.0 * m * n * k, error=0.0, configs=configs,
    )  # fmt: skip


def _int4(m: int, n: int, k: int, configs: Configs = ()) -> Case:
    inputs: Inputs = lambda device: (  # noqa: E731
        torch.randn((1, m, k), device=device),
        *weight(n, k, 4, device),
    )
    size = _bytes(m, n, k, 4, 4) + 3 * m * k
    return Case(
        f"int4 in_proj {m}", int4_reference, int4_linear, inputs, size, 2.0 * m * n * k,
        unit="bf16", error=1e-5, configs=configs,
    )  # fmt: skip


def _tilings(*tilings: Tiling) -> Configs:
    return ({}, *({"tiling": tiling} for tiling in tilings))


_PROMPT = _tilings(
    Tiling(128, 256, 0, 128, warps=8, stages=4, persistent=True),
    Tiling(128, 256, 64, 128, warps=8, stages=4, persistent=True),
    Tiling(128, 128, 64, 128, warps=8, stages=5, persistent=True),
    Tiling(128, 256, 0, 128, warps=8, stages=4, asynchronous=True),
)
_NARROW = _tilings(
    Tiling(64, 128, 32, 128, warps=4, stages=7, asynchronous=True),
    Tiling(128, 128, 32, 128, warps=8, stages=6, persistent=True),
    Tiling(128, 128, 0, 128, warps=8, stages=6, asynchronous=True),
    Tiling(64, 64, 0, 128, warps=4, stages=4, asynchronous=True),
)
_BATCH = _tilings(
    Tiling(64, 64, 16, 256, stages=6, asynchronous=True),
    Tiling(64, 64, 32, 256, stages=5, asynchronous=True),
    Tiling(64, 128, 0, 128, stages=4, asynchronous=True),
)
_BATCH_OUT = _tilings(
    Tiling(64, 32, 0, 256, stages=9, asynchronous=True),
    Tiling(64, 32, 0, 256, stages=3, asynchronous=True, shares=7),
    Tiling(64, 64, 32, 128, stages=5, asynchronous=True, shares=5),
)
_SPLIT = _tilings(
    Tiling(64, 32, 0, 128, stages=5, asynchronous=True, shares=8),
    Tiling(64, 64, 0, 128, stages=5, asynchronous=True, shares=5),
    Tiling(64, 64, 0, 128, stages=5, asynchronous=True, shares=8),
    Tiling(64, 64, 32, 128, stages=5, asynchronous=True, shares=2),
)
_PACKED = _tilings(Tiling(128, 128, warps=8, stages=3), Tiling(64, 64, warps=4, stages=4))

CASES: tuple[Case, ...] = (
    _quantize("in_proj 2.8b", 2048, 10240, 2560, _PROMPT),
    _add("out_proj 2.8b", 2048, 2560, 5120, _PROMPT),
    _quantize("in_proj 2.8b", 512, 10240, 2560, _PROMPT),
    _add("out_proj 2.8b", 512, 2560, 5120, _NARROW),
    _quantize("dt_proj 2.8b", 2048, 5120, 160),
    _quantize("dt_proj 2.8b", 512, 5120, 160),
    _split("x_proj 2.8b", 2048, [160, 16, 16], 5120, _SPLIT),
    _split("x_proj 2.8b", 512, [160, 16, 16], 5120, _SPLIT),
    _split("x_proj 2.8b", 64, [160, 16, 16], 5120, _SPLIT),
    _quantize("in_proj 2.8b", 64, 10240, 2560, _BATCH),
    _add("out_proj 2.8b", 64, 2560, 5120, _BATCH_OUT),
    _quantize("dt_proj 2.8b", 64, 5120, 160),
    _linear("x_proj 2.8b", 64, 192, 5120, _BATCH_OUT),
    _linear("head 2.8b", 64, 50280, 2560, _BATCH),
    _quantize("in_proj 2.8b", 16, 10240, 2560, _BATCH),
    _add("out_proj 2.8b", 16, 2560, 5120, _BATCH_OUT),
    _quantize("in_proj 2.8b", 256, 10240, 2560, _PROMPT),
    _quantize("in_proj mamba2 2.7b", 2048, 10576, 2560, _PROMPT),
    _quantize("in_proj mamba2 2.7b", 512, 10576, 2560, _PROMPT),
    _quantize("in_proj mamba2 2.7b", 64, 10576, 2560, _BATCH),
    _quantize("in_proj 130m", 2048, 3072, 768, _NARROW),
    _add("out_proj 130m", 2048, 768, 1536, _NARROW),
    _split("x_proj 130m", 2048, [48, 16, 16], 1536, _SPLIT),
    _quantize("in_proj 2.8b", 2048, 10240, 2560, _PACKED, bits=4),
    _add("out_proj 2.8b", 64, 2560, 5120, _PACKED, bits=4),
    _int4(2048, 10240, 2560),
    _int4(1, 10240, 2560),
)
