"""The decode kernels of linear layers against their operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmc import ops
from ssmc.quant.formats import pack, quantize_tensor, quantize_weight, scale_for

pytest.importorskip("triton")

from ssmc.kernels.matvec import int8_linear, int8_linear_add, matvec, norm_linear_step
from ssmc.kernels.matvec_conv import in_proj_conv_step
from ssmc.kernels.matvec_int4 import division
from ssmc.kernels.matvec_tiles import parts_of


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def weight(n: int, k: int, group: int = 0) -> tuple[Tensor, Tensor]:
    """A random weight of int8, or of 4 bits in groups."""
    w = torch.randn(n, k)
    if not group:
        return quantize_weight(w)
    scale = scale_for(w.view(n, -1, group).abs().amax(-1), bits=4)
    q = quantize_tensor(w.view(n, -1, group), scale.unsqueeze(-1), bits=4)
    return pack(q.view(n, k), 4, group), scale


def vector(n: int) -> Tensor:
    return torch.randn(n)


def close(got: Tensor, expected: Tensor, error: float = 2e-6) -> bool:
    return got.shape == expected.shape and (got - expected).norm() <= error * expected.norm()


def run(
    kernel: Callable[..., Any],
    device: torch.device,
    *args: Any,
    block_n: int | None = 16,
    **config: Any,
) -> Any:
    """The kernel's results, back on the CPU; few programs, each of which the interpreter runs."""
    config["block_n"] = block_n
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    result = kernel(*moved, **config)
    return [r.cpu() for r in result] if isinstance(result, tuple) else result.cpu()


@pytest.mark.parametrize(
    ("width", "smallest", "parts"),
    [
        (5120, 128, (4096, 1024)),
        (768, 256, (512, 256)),
        (1000, 128, (512, 256, 256)),
        (63, 128, (128,)),
        (2112, 128, (2048, 128)),
        (64, 64, (64,)),
    ],
)
def test_parts_hold_the_width(width: int, smallest: int, parts: tuple[int, ...]) -> None:
    assert parts_of(width, smallest) == parts


@pytest.mark.parametrize(("n", "k"), [(1, 64), (40, 192), (63, 1000), (20, 320)])
@pytest.mark.parametrize("rows", [1, 3])
def test_int8_linear_has_the_operators_bits(
    n: int, k: int, rows: int, device: torch.device
) -> None:
    x_q, x_scale = ops.quantize_dynamic(torch.randn(rows, 1, k))
    w_q, w_scale = weight(n, k)
    bias = vector(n) if rows == 1 else None
    if rows == 3:
        w_scale, x_scale = w_scale.amax(), x_scale.amax()
    args = (x_q, x_scale, w_q, w_scale, bias)
    assert torch.equal(run(int8_linear, device, *args), ops.int8_linear(*args))


def test_a_weight_of_few_rows_has_a_warp_for_each(device: torch.device) -> None:
    x_q, x_scale = ops.quantize_dynamic(torch.randn(1, 1, 320))
    w_q, w_scale = weight(5, 320)
    how = matvec(w_q, w_scale, rows=1)
    assert how is not None
    assert (how.block_n, how.warps) == (2, 2)
    args = (x_q, x_scale, w_q, w_scale, None)
    assert torch.equal(run(int8_linear, device, *args, block_n=None), ops.int8_linear(*args))


def packed(n: int, k: int, group: int = 128) -> tuple[Tensor, Tensor]:
    """Storage for a weight of 4 bits, and for its scales."""
    return torch.empty(n, k // 2, dtype=torch.uint8), torch.empty(n, k // group)


@pytest.mark.parametrize(
    ("n", "k", "rows", "warps"), [(10240, 2560, 80, 8), (2560, 5120, 20, 4), (3072, 768, 24, 4)]
)
def test_multiprocessors_hold_a_weight_of_4_bits(n: int, k: int, rows: int, warps: int) -> None:
    how = division(*packed(n, k), count=132)
    assert how is not None
    assert (how.rows, how.warps) == (rows, warps)
    assert 132 * how.rows >= n


@pytest.mark.parametrize(
    ("n", "k", "group"), [(192, 5120, 128), (50280, 2560, 128), (2560, 5136, 48), (2560, 5120, 16)]
)
def test_what_they_do_not_hold(n: int, k: int, group: int) -> None:
    assert division(*packed(n, k, group), count=132) is None


def test_int8_linear_of_a_view(device: torch.device) -> None:
    x_q = torch.randint(-127, 128, (2, 1, 300), dtype=torch.int8)[..., 101:229]
    args = (x_q, torch.rand(2, 1, 1).bfloat16().float(), *weight(20, 128), None)
    assert torch.equal(run(int8_linear, device, *args), ops.int8_linear(*args))


@pytest.mark.parametrize(("k", "group"), [(128, 32), (192, 64), (384, 128), (320, 64)])
def test_int4_linear(k: int, group: int, device: torch.device) -> None:
    x_q, x_scale = ops.quantize_dynamic(torch.randn(2, 1, k))
    args = (x_q, x_scale, *weight(37, k, group), vector(37))
    assert close(run(int8_linear, device, *args), ops.int8_linear(*args))


@pytest.mark.parametrize(("n", "k", "group"), [(63, 96, 0), (40, 768, 0), (40, 384, 128)])
@pytest.mark.parametrize("rows", [1, 2])
def test_norm_linear(n: int, k: int, group: int, rows: int, device: torch.device) -> None:
    norm = vector(k) if n != 40 else None
    args = (torch.randn(rows, 1, k), norm, 1e-5, *weight(n, k, group), vector(n))
    # A value at the border of two integers may fall to either.
    got, expected = run(norm_linear_step, device, *args), ops.norm_linear_step(*args)
    assert close(got, expected, 1e-3)


@pytest.mark.parametrize(("k", "group"), [(1000, 0), (640, 128)])
@pytest.mark.parametrize("rows", [1, 3])
def test_int8_linear_added_to_a_residual(
    k: int, group: int, rows: int, device: torch.device
) -> None:
    x_q, x_scale = ops.quantize_dynamic(torch.randn(rows, 1, k))
    residual = torch.randn(rows, 1, 74)[..., 37:]
    args = (x_q, x_scale, *weight(37, k, group), vector(37), residual)
    got, expected = run(int8_linear_add, device, *args), ops.int8_linear_add(*args)
    assert close(got, expected) if group else torch.equal(got, expected)


def in_proj_inputs(
    rows: int, k: int, start: int, channels: int, width: int, n: int, group: int = 0, taps: int = 4
) -> tuple[Any, ...]:
    conv_w_q, conv_w_scale = quantize_weight(torch.randn(channels, taps))
    return (
        torch.randn(rows, 1, k),
        vector(k),
        1e-5,
        *weight(n, k, group),
        vector(n),
        scale_for(torch.full((n,), 3 * k**0.5)),
        start,
        conv_w_q,
        conv_w_scale,
        vector(channels),
        torch.randint(-127, 128, (rows, taps - 1, channels), dtype=torch.int8),
        "silu",
        scale_for(torch.rand(width) * 40 + 10),
    )


IN_PROJ = [
    in_proj_inputs(1, 64, 0, 128, 128, 256),
    in_proj_inputs(2, 96, 50, 130, 100, 200),
    in_proj_inputs(3, 128, 0, 20, 20, 40, group=64),
    in_proj_inputs(1, 64, 3, 20, 0, 40, taps=2),
    in_proj_inputs(10, 96, 50, 130, 100, 200),
]


@pytest.mark.parametrize("args", IN_PROJ)
def test_in_proj_conv(args: tuple[Any, ...], device: torch.device) -> None:
    expected = ops.in_proj_conv_step(*args)
    state = args[-3].to(device, copy=True)
    got = in_proj_conv_step(
        *(a.to(device) if isinstance(a, Tensor) else a for a in args[:-3]),
        state,
        args[-2],
        args[-1].to(device),
        block_n=64,
    )
    assert got[3] is state
    for result, wanted in zip(got, expected, strict=True):
        assert result.shape == wanted.shape
        assert result.dtype == wanted.dtype
        if result.dtype == torch.int8:
            difference = (result.cpu().int() - wanted.int()).abs()
            assert difference.numel() == 0 or difference.max() <= 1
            assert (difference > 0).sum() <= 0.01 * difference.numel()
        else:
            assert close(result.cpu(), wanted, 1e-2)


def test_in_proj_conv_without_bias_or_activation(device: torch.device) -> None:
    args = list(in_proj_inputs(1, 64, 0, 128, 128, 256))
    args[1] = args[5] = args[10] = None
    args[12] = "none"
    expected = ops.in_proj_conv_step(*args)
    got = run(in_proj_conv_step, device, *args)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_many_rows_take_the_batched_kernels(device: torch.device) -> None:
    w_q, w_scale = weight(20, 64)
    assert matvec(w_q, w_scale, 9) is None
    args = (torch.randn(9, 1, 64), vector(64), 1e-5, w_q, w_scale, None)
    assert close(run(norm_linear_step, device, *args), ops.norm_linear_step(*args), 1e-3)
    args = (*ops.quantize_dynamic(torch.randn(9, 1, 64)), w_q, w_scale, None)
    assert torch.equal(run(int8_linear, device, *args), ops.int8_linear(*args))
    added = (*args, torch.randn(9, 1, 20))
    assert torch.equal(run(int8_linear_add, device, *added), ops.int8_linear_add(*added))


@pytest.mark.parametrize(("block_n", "num_warps"), [(1, 4), (4, 8), (32, 4)])
def test_tiles_change_no_bit(block_n: int, num_warps: int, device: torch.device) -> None:
    args = (torch.randn(1, 1, 128), vector(128), 1e-5, *weight(37, 128), vector(37))
    got = run(norm_linear_step, device, *args, block_n=block_n, num_warps=num_warps)
    assert torch.equal(got, run(norm_linear_step, device, *args))
