"""Kernels for the CPU against the operators: integers bit by bit, floats within what is stated."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.samples import samples
from passes.rotation import rotation
from quant.orders import rotations
from torch import Tensor

from ssmc import ops
from ssmc.errors import UsageError
from ssmc.lowering.backends import cpu
from ssmc.quant.formats import bf16_up, quantize_weight

pytest.importorskip("numba")

EXACT = {
    "cache_append", "cache_append_step", "cache_quantize_step", "int8_embedding",
    "int8_expert_linear", "int8_linear", "int8_linear_add", "int8_linear_quantize",
    "int8_linear_split", "position_step", "quantize", "quantize_dynamic",
}  # fmt: skip
NAMES = sorted(name for names in cpu.KERNELS.values() for name in names)


def kernel(name: str) -> Callable[..., Any]:
    return cpu.COMPILED.load()[f"ssmc::{name}"]


def members(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def copies(args: tuple[Any, ...]) -> Iterator[Any]:
    return (a.clone() if isinstance(a, Tensor) else a for a in args)


def check(name: str, *args: Any) -> None:
    """One call of the kernel and one of the operator, held against the stated tolerance."""
    got = members(kernel(name)(*copies(args)))
    expected = members(getattr(ops, name)(*copies(args)))
    assert [(g.shape, g.dtype) for g in got] == [(e.shape, e.dtype) for e in expected]
    allowed = cpu.COMPILED.tolerance(f"ssmc::{name}")
    for g, e in zip(got, expected, strict=True):
        if name in EXACT:
            assert torch.equal(g, e)
        elif e.is_floating_point():
            assert (g.double() - e.double()).norm() <= allowed.error * e.double().norm() + 1e-30
        else:
            apart = (g.int() - e.int()).abs()
            assert apart.max() <= 1
            assert apart.sum() <= allowed.flips * apart.numel()


def integers(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def scales(*shape: int) -> Tensor:
    return bf16_up(0.01 + 0.02 * torch.rand(shape))


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_the_operators(name: str) -> None:
    shown = "cache_append" if name == "cache_append_step" else name
    mine = [args for operator, args in samples() if operator == shown]
    mine = [args for args in mine if name == shown or args[1].shape[1] == 1]
    assert mine
    for args in mine:
        check(name, *args)


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_the_operators(name: str) -> None:
    given = inspect.signature(kernel(name)).parameters.values()
    expected = inspect.signature(getattr(ops, name)).parameters.values()
    assert [(p.name, p.default) for p in given] == [(p.name, p.default) for p in expected]


def test_tolerances_are_of_operators_that_have_kernels() -> None:
    assert set(cpu.TOLERANCES) <= set(NAMES) - EXACT
    assert cpu.COMPILED.tolerance("ssmc::int8_linear").error == 0


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 1), (1, 17, 63), (8, 48, 64), (9, 100, 63), (70, 49, 130), (33, 5, 1000), (200, 96, 2)],
)
def test_products_have_the_operators_bits(m: int, n: int, k: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        args = (integers(m, k), scales(m, 1), *quantize_weight(torch.randn(n, k)))
        check("int8_linear", *args, torch.randn(n))
        check("int8_linear_add", *args, None, torch.randn(m, n))
        check("int8_linear_quantize", *args, None, scales(n) * k)
    finally:
        torch.set_num_threads(before)


def test_products_of_the_largest_integers_do_not_overflow() -> None:
    for m in (1, 40):
        x, w = torch.full((m, 4000), -127, dtype=torch.int8), torch.full((50, 4000), 127).char()
        check("int8_linear", x, torch.tensor(0.5), w, torch.tensor(0.25))
        check("int8_linear", -x, torch.tensor(0.5), w, torch.tensor(0.25))


def test_products_without_the_instruction_for_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba
    import numpy as np

    from ssmc.kernels.cpu import products

    monkeypatch.setattr(products, "has_vnni", lambda: False)

    @numba.njit  # type: ignore[misc]
    def multiply(out: Any, x: Any, w: Any) -> None:
        products.rows_product(out.ctypes.data, x.ctypes.data, w.ctypes.data, 128, 16, 2)

    x, w = (
        torch.randint(-127, 128, shape).numpy().astype(np.int8) for shape in ((128,), (16, 128))
    )
    out = np.zeros(16, np.int32)
    multiply(out, x, w)
    assert (out == w.astype(np.int32) @ x.astype(np.int32)).all()


@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 5, 63), (1, 3, 1000)])
def test_norms_and_rotations_of_views(shape: tuple[int, ...]) -> None:
    x, residual = torch.randn(2, *shape[:-1], shape[-1] + 9)[..., 4 : 4 + shape[-1]]
    check("rms_norm_quantize", x, torch.rand(shape[-1]) + 0.5, 1e-3)
    check("add_rms_norm_quantize", x, residual)
    check("hadamard_quantize", x, shape[-1] & -shape[-1])
    check("quantize_dynamic", x)


@settings(deadline=None, max_examples=40)
@given(rotations(), st.integers(1, 3))
def test_rotations_are_products_with_the_explicit_matrix(size: tuple[int, int], rows: int) -> None:
    n, block = size
    x = torch.randn(1, rows, n)
    expected = x @ rotation(n, block).T
    torch.testing.assert_close(kernel("hadamard")(x, block), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "group", "block"), [(63, 21, 1), (192, 48, 192), (1000, None, 8)])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_gated_norms(n: int, group: int | None, block: int, norm_before_gate: bool) -> None:
    gate, weight = integers(1, 3, 2 * n)[..., n:], torch.rand(n) + 0.5
    args = (torch.randn(1, 3, n), gate, scales(n), weight, 1e-5, group, norm_before_gate, block)
    check("gated_norm_quantize", *args)


@pytest.mark.parametrize("taps", [2, 3, 4, 5])
@pytest.mark.parametrize(("length", "width"), [(1, 5), (6, 32), (9, 300)])
def test_convolutions_with_and_without_a_state(length: int, width: int, taps: int) -> None:
    weight = quantize_weight(torch.randn(width, taps))
    args = (integers(2, length, width), scales(width), *weight)
    for bias, state in ((None, None), (torch.randn(width), integers(2, taps - 1, width))):
        check("int8_causal_conv1d", *args, bias, state, "none")
        check("int8_causal_conv1d_quantize", *args, bias, state, "silu", scales(width))


@pytest.mark.parametrize("length", [1, 2, 7])
def test_convolutions_of_many_channels(length: int) -> None:
    wide = integers(2, length, 900)
    taps = quantize_weight(torch.randn(600, 4))
    args = (wide[..., 150:750], scales(600), *taps, torch.randn(600), integers(2, 3, 600), "silu")
    check("int8_causal_conv1d", *args)
    check("int8_causal_conv1d_quantize", *args, scales(600))
    check("int8_causal_conv1d_split", *args, scales(3, 100), 2)
    with pytest.raises(UsageError, match="relu"):
        kernel("int8_causal_conv1d")(*args[:-1], "relu")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 8, 16), (2, 41, 45, 16), (1, 5, 7, 5), (1, 17, 64, 20)])
def test_selective_scans(shape: tuple[int, int, int, int], reverse: bool) -> None:
    batch, length, width, rank = shape
    wide, token = integers(batch, length, 2 * width), (batch, length, 1)
    B, C = integers(2, batch, length, rank)
    args = (wide[..., :width], scales(width), integers(batch, length, width), scales(width))
    A, D, bias = -0.1 - 8 * torch.rand(width, rank), *torch.randn(2, width)
    rest = (A, B, scales(*token), C, scales(*token), D, wide[..., width:], scales(width), bias)
    state = torch.randn(batch, width, rank)
    check("int8_selective_scan", *args, *rest, state, True, reverse)
    by_state = (A, B, scales(rank), C, scales(rank))  # scales that no kernel takes
    check("int8_selective_scan", *args, *by_state)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("length", "width", "rank"), [(1, 64, 128), (70, 3, 5), (5, 20, 40), (3, 16, 147)]
)
def test_ssd_scans(length: int, width: int, rank: int, reverse: bool) -> None:
    heads, groups = 4, 2
    x = integers(2, length, heads * width + 3)[..., 3:].unflatten(-1, (heads, width))
    dt, A = integers(2, length, heads), -1 - torch.rand(heads)
    B, C = integers(2, 2, length, groups, rank)
    B_scale, C_scale = scales(2, 2, length, groups, 1)
    D, bias = torch.randn(2, heads)
    args = (x, scales(heads, width), dt, scales(heads), A, B, B_scale, C, C_scale)
    check("int8_ssd_scan", *args, None, None, None, 0.01, 0.5, reverse)
    state = torch.randn(2, heads, width, rank)
    check("int8_ssd_scan", *args, D, bias, state, 0.0, float("inf"), reverse)


def test_a_step_writes_over_its_state() -> None:
    (args,) = [a for name, a in samples() if name == "selective_scan_step"][:1]
    state = next(a for a in args if isinstance(a, Tensor) and a.dim() == 3 and a.shape[-1] == 3)
    before = state.clone()
    _, new = kernel("selective_scan_step")(*args)
    assert new.data_ptr() == state.data_ptr()
    assert not torch.equal(state, before)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("shape", [(3, 5), (0, 7), (1, 1021, 1031)])
def test_memory_for_results(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from ssmc.kernels.cpu.launch import empty

    x = empty(shape, dtype)
    assert (tuple(x.shape), x.dtype, x.is_contiguous()) == (shape, dtype, True)
    assert x.data_ptr() % 64 == 0
    x.fill_(1)  # all of it is there
    assert int((x == 1).sum()) == x.numel()


def test_a_forked_process_has_threads_of_its_own() -> None:
    x = torch.randn(4, 64)
    expected = kernel("quantize_dynamic")(x)[0]
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(kernel("quantize_dynamic")(x)[0], expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_loops_use_all_of_a_register() -> None:
    import numba

    from ssmc.kernels.cpu import has_vnni

    @numba.njit("(float32[::1], float32[::1])")  # type: ignore[misc]
    def double(x: Any, y: Any) -> None:
        for i in range(len(x)):
            y[i] = x[i] + x[i]

    (assembly,) = double.inspect_asm().values()
    assert ("zmm" in assembly) == has_vnni()
