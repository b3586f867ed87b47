"""Matrix products of many rows against the operators they stand for: the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmc import ops
from ssmc.kernels import matmul, matmul_int4, matmul_split
from ssmc.kernels.tiles import Tiling
from ssmc.ops import int4
from ssmc.quant.formats import bf16_up, pack

SHAPES = [(63, 80, 100), (20, 64, 96), (9, 33, 7), (130, 48, 160), (65, 40, 288)]
TILINGS = [
    None,
    Tiling(32, 32, 0, 64, group=2),
    Tiling(32, 32, 16, 64, descriptors=True),
    Tiling(16, 64, 16, 32),
    Tiling(32, 32, 0, 32, descriptors=True, shares=3),
    # The rest are of kernels for Hopper; elsewhere the same tiles in Triton's.
    Tiling(64, 64, 16, 64, descriptors=True, asynchronous=True),
    Tiling(64, 32, 0, 64, stages=2, descriptors=True, asynchronous=True, shares=2),
    Tiling(128, 64, 32, 64, warps=8, descriptors=True, persistent=True),
]


def scale(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return bf16_up(torch.rand(shape, device=device) * 0.02 + 1e-4)


def integers(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)


def operands(m: int, n: int, k: int, device: torch.device) -> tuple[Tensor, ...]:
    """x_q [2 or 1, length, k] with a scale a token, and a weight with a scale a channel."""
    batch = 2 if m % 2 == 0 else 1
    lead = (batch, m // batch)
    x, w = integers((*lead, k), device), integers((n, k), device)
    return x, scale((*lead, 1), device), w, scale((n, 1), device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tiling", TILINGS)
def test_linear(shape: tuple[int, int, int], tiling: Tiling | None, device: torch.device) -> None:
    args = operands(*shape, device)
    bias = torch.randn(shape[1], device=device)
    assert torch.equal(matmul.int8_linear(*args, tiling=tiling), ops.int8_linear(*args))
    got = matmul.int8_linear(*args, bias, tiling=tiling)
    assert torch.equal(got, ops.int8_linear(*args, bias))


def test_sums_above_what_a_float_holds(device: torch.device) -> None:
    x = torch.full((16, 2048), 127, dtype=torch.int8, device=device)
    w = torch.full((16, 2048), 127, dtype=torch.int8, device=device)
    x[:, 5] = torch.arange(16, dtype=torch.int8)
    args = x, scale((), device), w, scale((16, 1), device)
    assert torch.equal(matmul.int8_linear(*args), ops.int8_linear(*args))


@pytest.mark.parametrize("residual", [False, True])
def test_more_tiles_than_processors(residual: bool, device: torch.device) -> None:
    m, n, k = 2050, 1000, 160
    args = operands(m, n, k, device)
    tiling = Tiling(128, 64, 0, 128, warps=8, descriptors=True, persistent=True)
    if residual:
        old = torch.randn((2, m // 2, n), device=device)
        got = matmul.int8_linear_add(*args, None, old, tiling=tiling)
        assert torch.equal(got, ops.int8_linear_add(*args, None, old))
    else:
        out_scale = scale((n,), device) * 16
        got = matmul.int8_linear_quantize(*args, None, out_scale, tiling=tiling)
        assert torch.equal(got, ops.int8_linear_quantize(*args, None, out_scale))


@pytest.mark.parametrize("tiling", TILINGS)
def test_scales_of_a_tensor_and_strided_rows(tiling: Tiling | None, device: torch.device) -> None:
    wide = integers((2, 21, 160), device)
    w, bias = integers((40, 64), device), torch.randn(40, device=device)
    for x in (wide[..., 32:96], wide[..., 3:67]):
        args = x, scale((), device), w, scale((), device), bias
        assert torch.equal(matmul.int8_linear(*args, tiling=tiling), ops.int8_linear(*args))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tiling", TILINGS)
def test_add_and_quantize(
    shape: tuple[int, int, int], tiling: Tiling | None, device: torch.device
) -> None:
    args = operands(*shape, device)
    bias = torch.randn(shape[1], device=device)
    wide = torch.randn((*args[0].shape[:-1], shape[1] + 5), device=device)
    residual = wide[..., 2 : 2 + shape[1]]
    got = matmul.int8_linear_add(*args, bias, residual, tiling=tiling)
    assert torch.equal(got, ops.int8_linear_add(*args, bias, residual))
    for out_scale in (scale((shape[1],), device) * 16, scale((), device) * 16):
        got = matmul.int8_linear_quantize(*args, None, out_scale, tiling=tiling)
        assert torch.equal(got, ops.int8_linear_quantize(*args, None, out_scale))


@pytest.mark.parametrize("shares", [1, 3, None])
@pytest.mark.parametrize("sizes", [(12, 4, 4), (48, 16, 16), (7,), (100, 60)])
def test_split(shares: int | None, sizes: tuple[int, ...], device: torch.device) -> None:
    args = operands(21, sum(sizes), 416, device)
    bias = torch.randn(sum(sizes), device=device)
    for extra in (None, bias):
        got = matmul_split.int8_linear_split(*args, extra, sizes, shares=shares)
        expected = ops.int8_linear_split(*args, extra, sizes)
        assert len(got) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_no_rows(device: torch.device) -> None:
    args = operands(0, 16, 32, device)
    assert matmul.int8_linear(*args).shape == (2, 0, 16)


def packed(n: int, k: int, group: int, device: torch.device) -> tuple[Tensor, Tensor]:
    q = torch.randint(-8, 8, (n, k), dtype=torch.int8, device=device)
    signs = torch.randint(0, 2, (n, k // group), device=device) * 2 - 1
    return pack(q, 4, group), signs * scale((n, k // group), device)


def close(got: Tensor, expected: Tensor) -> bool:
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    return got.dtype == expected.dtype and float(error) < 1e-6


@pytest.mark.parametrize(("k", "group"), [(256, 128), (96, 32), (160, 160), (120, 24)])
@pytest.mark.parametrize("m", [3, 20, 65])
def test_int4(m: int, k: int, group: int, device: torch.device) -> None:
    n = 40
    x, x_scale, *_ = operands(m, n, k, device)
    args = x, x_scale, *packed(n, k, group, device)
    bias = torch.randn(n, device=device)
    residual = torch.randn((*x.shape[:-1], n), device=device)
    assert close(matmul.int8_linear(*args, bias), ops.int8_linear(*args, bias))
    got = matmul.int8_linear_add(*args, bias, residual)
    assert close(got, ops.int8_linear_add(*args, bias, residual))
    out_scale = scale((n,), device)
    got = matmul.int8_linear_quantize(*args, bias, out_scale).int()
    expected = ops.int8_linear_quantize(*args, bias, out_scale).int()
    assert (got - expected).abs().max() <= 1
    assert ((got != expected).double().mean()) < 1e-3
    splits = matmul_split.int8_linear_split(*args, bias, (20, 20))
    for a, b in zip(splits, ops.int8_linear_split(*args, bias, (20, 20)), strict=True):
        assert (a.double() - b.double()).abs().max() <= 1


@pytest.mark.parametrize(("k", "group"), [(256, 128), (96, 32), (160, 160), (120, 24)])
@pytest.mark.parametrize("m", [1, 3, 20])
def test_int4_weights_alone(m: int, k: int, group: int, device: torch.device) -> None:
    x = torch.randn((m, 1, k), device=device)
    args = x, *packed(40, k, group, device)
    bias = torch.randn(40, device=device)
    assert close(matmul_int4.int4_linear(*args), int4.int4_linear(*args))
    assert close(matmul_int4.int4_linear(*args, bias), int4.int4_linear(*args, bias))
