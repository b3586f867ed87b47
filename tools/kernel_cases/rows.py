"""Kernels that take one row at a time: norms, rotations, quantisation and the embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernel_cases.case import Case
from ssmc import ops
from ssmc.kernels.embedding import int8_embedding
from ssmc.kernels.hadamard import hadamard, hadamard_quantize
from ssmc.kernels.norm import add_rms_norm_quantize, gated_norm_quantize, rms_norm_quantize
from ssmc.kernels.quantize import quantize, quantize_dynamic
from ssmc.quant.formats import scale_for

# A scale rounded up to bfloat16 may fall on its other neighbour, 2^-8 apart, for a row in some ten
# thousand, since the sums of a row are in another order; its integers then differ too.
ERROR, FLIPS = 2e-3, 3e-3

ROWS = (1, 64, 512, 2048)


def _tokens(m: int, n: int, device: torch.device) -> Tensor:
    """Decoding has as many sequences as rows, a prompt one sequence."""
    shape = (m, 1, n) if m <= 64 else (1, m, n)
    x = torch.randn(shape, device=device)
    return x * torch.exp(torch.randn(n, device=device))


def _warps(*numbers: int, **fixed: int) -> tuple[dict[str, int], ...]:
    return tuple({"num_warps": number, **fixed} for number in numbers)


def _norm(m: int, n: int, weighted: bool) -> Case:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        weight = torch.rand(n, device=device) + 0.5 if weighted else None
        return _tokens(m, n, device), weight, 1e-5

    size = m * n * (4 + 1) + 4 * m + (4 * n if weighted else 0)
    name = f"norm quantize {n} {m}" + (" weighted" if weighted else "")
    return Case(
        name, ops.rms_norm_quantize, rms_norm_quantize, inputs, size,
        error=ERROR, flips=FLIPS, configs=_warps(2, 4, 8) if n == 2560 and not weighted else (),
    )  # fmt: skip


def _add_norm(m: int, n: int) -> Case:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        return _tokens(m, n, device), _tokens(m, n, device), None, 1e-5

    return Case(
        f"add norm quantize {n} {m}", ops.add_rms_norm_quantize, add_rms_norm_quantize, inputs,
        m * n * (4 + 4 + 4 + 1) + 4 * m, error=ERROR, flips=FLIPS,
        configs=_warps(2, 4, 8) if m == 2048 else (),
    )  # fmt: skip


def _rotation(m: int, n: int, block: int) -> Case:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        return _tokens(m, n, device), block

    return Case(
        f"hadamard quantize {n}/{block} {m}", ops.hadamard_quantize, hadamard_quantize, inputs,
        m * n * (4 + 1) + 4 * m, error=ERROR, flips=FLIPS,
        configs=_warps(2, 4, 8) if n == block == 5120 else (),
    )  # fmt: skip


def _plain_rotation(m: int, n: int) -> Case:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        return _tokens(m, n, device), n

    return Case(f"hadamard {n} {m}", ops.hadamard, hadamard, inputs, m * n * 8, error=1e-6)


def _gated(m: int, n: int, block: int, group_size: int | None = None) -> Case:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        wide = torch.randint(-127, 128, (1, m, 2 * n + 336), dtype=torch.int8, device=device)
        if m <= 64:
            wide = wide.transpose(0, 1)
        gate_scale = scale_for(torch.rand(n, device=device) * 4 + 1)
        weight = torch.rand(n, device=device) + 0.5
        x = _tokens(m, n, device)
        return x, wide[..., :n], gate_scale, weight, 1e-5, group_size, False, block

    name = f"gated norm quantize {n}/{block} {m}" + (f" groups {group_size}" if group_size else "")
    return Case(
        name, ops.gated_norm_quantize, gated_norm_quantize, inputs,
        m * n * (4 + 1 + 1) + 8 * n + 4 * m, error=ERROR, flips=FLIPS,
        configs=(*_warps(2, 4, 8), {"maxnreg": 96}, {"maxnreg": 80}) if block == n else (),
    )  # fmt: skip


def _quantize(m: int, n: int) -> Case:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        return _tokens(m, n, device), scale_for(torch.rand(n, device=device) * 4 + 1)

    return Case(
        f"quantize {n} {m}", ops.quantize, quantize, inputs, m * n * 5 + 4 * n, error=0.0,
        configs=tuple({"block_m": rows, "block_n": 512} for rows in (1, 4, 16)) if m > 64 else (),
    )  # fmt: skip


def _dynamic(m: int, n: int) -> Case:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        return (_tokens(m, n, device),)

    return Case(
        f"quantize dynamic {n} {m}", ops.quantize_dynamic, quantize_dynamic, inputs,
        m * n * 5 + 4 * m, error=0.0,
    )  # fmt: skip


def _embedding(m: int, n: int) -> Case:
    vocabulary = 50280

    def inputs(device: torch.device) -> tuple[Any, ...]:
        shape = (m, 1) if m <= 64 else (1, m)
        table = torch.randint(-127, 128, (vocabulary, n), dtype=torch.int8, device=device)
        scale = scale_for(torch.rand(vocabulary, 1, device=device) + 1)
        return torch.randint(vocabulary, shape, device=device), table, scale

    return Case(
        f"embedding {n} {m}", ops.int8_embedding, int8_embedding, inputs,
        m * (n * (1 + 4) + 8 + 4), error=0.0,
        configs=({"block_n": 512}, {"block_n": 1024, "num_warps": 2}) if m in (1, 2048) else (),
    )  # fmt: skip


CASES: tuple[Case, ...] = (
    *(_norm(m, 2560, False) for m in ROWS),
    _norm(2048, 2560, True),
    _norm(2048, 768, False),
    _norm(64, 10752, False),
    *(_add_norm(m, 2560) for m in (64, 2048)),
    *(_rotation(m, 5120, 5120) for m in ROWS),
    _rotation(2048, 1536, 1536),
    _rotation(2048, 4096, 4096),
    _rotation(2048, 5120, 1024),
    _plain_rotation(512, 5120),
    *(_gated(m, 5120, 5120) for m in ROWS),
    _gated(2048, 5120, 1),
    _gated(2048, 5120, 5120, 640),
    *(_quantize(m, 5120) for m in (64, 2048)),
    *(_dynamic(m, 2560) for m in (64, 2048)),
    _dynamic(2048, 16),
    *(_embedding(m, 2560) for m in ROWS),
)
