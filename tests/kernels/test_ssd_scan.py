"""The kernels of the Mamba-2 scan against the definitions of their operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ssmc import ops
from ssmc.kernels.ssd_scan import int8_ssd_scan, int8_ssd_scan_state
from ssmc.kernels.ssd_step import ssd_scan_step
from ssmc.quant.formats import bf16_up

Operands = dict[str, Any]


def scales(*shape: int, size: float) -> Tensor:
    return bf16_up(size * (0.5 + torch.rand(shape)))


def integers(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def operands(
    device: torch.device,
    length: int,
    batch: int = 1,
    heads: int = 4,
    width: int = 20,
    groups: int = 2,
    rank: int = 12,
) -> Operands:
    """Every operand, integers as views of the rows of a projection."""
    channels, width_BC = heads * width, groups * rank
    rows = integers(batch, length, channels + 2 * width_BC + heads)
    x, B, C, dt = rows.split([channels, width_BC, width_BC, heads], -1)
    given = {
        "x_q": x.unflatten(-1, (heads, width)),
        "x_scale": scales(heads, width, size=0.02),
        "dt_q": dt,
        "dt_scale": scales(heads, size=0.03),
        "A": -torch.rand(heads) * 4,
        "B_q": B.unflatten(-1, (groups, rank)),
        "B_scale": scales(batch, length, groups, 1, size=0.02),
        "C_q": C.unflatten(-1, (groups, rank)),
        "C_scale": scales(batch, length, groups, 1, size=0.02),
        "D": torch.randn(heads),
        "dt_bias": torch.randn(heads) - 2,
        "state": torch.randn(batch, heads, width, rank),
    }
    return {name: tensor.to(device) for name, tensor in given.items()}


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    distance = (actual.double() - expected.double()).norm()
    return float(distance / expected.double().norm())


def check(given: Operands, state_error: float = 1e-6, **how: Any) -> None:
    limits = {name: given.pop(name) for name in ("dt_min", "dt_max", "reverse") if name in given}
    before = None if given["state"] is None else given["state"].clone()
    expected_y, expected_state = ops.int8_ssd_scan(**given, **limits)
    y, state = int8_ssd_scan(**given, **limits, **how)
    assert y.is_contiguous()
    assert error(y, expected_y) < 4e-4
    assert error(state, expected_state) < state_error
    if before is not None:
        assert torch.equal(given["state"], before)


@pytest.mark.parametrize("length", [1, 2, 16, 63, 200])
def test_any_length(device: torch.device, length: int) -> None:
    check(operands(device, length, batch=2))


@pytest.mark.parametrize("channels", [16, 32, 128])
def test_channels(device: torch.device, channels: int) -> None:
    given = operands(device, 40, batch=2, width=50)
    check(given, chunk=16, channels=channels)


def test_published_head(device: torch.device) -> None:
    check(operands(device, 130, heads=2, width=64, groups=1, rank=128))


@pytest.mark.parametrize("length", [1, 63, 130])
@pytest.mark.parametrize(("width", "groups", "rank"), [(64, 1, 128), (64, 2, 50), (128, 1, 64)])
def test_heads_side_by_side(
    device: torch.device, length: int, width: int, groups: int, rank: int
) -> None:
    """As the kernels of a Hopper GPU take them."""
    given = operands(device, length, batch=2, heads=2, width=width, groups=groups, rank=rank)
    check(given | {"x_q": given["x_q"].contiguous()})


@pytest.mark.parametrize("absent", ["D", "dt_bias", "state"])
def test_heads_side_by_side_without_optional_operands(device: torch.device, absent: str) -> None:
    given = operands(device, 70, heads=2, width=64, groups=1, rank=64)
    check(given | {"x_q": given["x_q"].contiguous(), absent: None})


@pytest.mark.parametrize("absent", ["D", "state"])
def test_channels_without_a_scale(device: torch.device, absent: str) -> None:
    given = operands(device, 70, heads=2, width=64, groups=1, rank=64)
    given["x_scale"][:, ::3] = 0.0
    given["x_scale"][0] = 0.0
    check(given | {"x_q": given["x_q"].contiguous(), absent: None})


@pytest.mark.parametrize("segments", [1, 2, 4, 100])
def test_segments(device: torch.device, segments: int) -> None:
    check(operands(device, 75), chunk=16, segments=segments)
    given = operands(device, 300, heads=1, width=64, groups=1, rank=64)
    check(given | {"x_q": given["x_q"].contiguous()}, segments=segments)


def test_the_last_positions_count_most_and_are_precise(device: torch.device) -> None:
    # Sums of decays from the start of a chunk have errors of 1e-4 here.
    given = operands(device, 64)
    check(given | {"A": given["A"] * 40}, state_error=1e-6)


def test_chunk_of_128(device: torch.device) -> None:
    check(operands(device, 150), chunk=128)


def test_without_split_the_state_is_as_precise_as_y(device: torch.device) -> None:
    check(operands(device, 70), state_error=4e-4, split=False)


@pytest.mark.parametrize("absent", ["D", "dt_bias", "state"])
def test_optional_operands(device: torch.device, absent: str) -> None:
    check(operands(device, 40) | {absent: None})


def test_step_limits(device: torch.device) -> None:
    check(operands(device, 40) | {"dt_min": 0.1, "dt_max": 0.3})


def test_a_state_in_bfloat16(device: torch.device) -> None:
    given = operands(device, 70)
    given["state"] = given["state"].bfloat16()
    expected_y, expected_state = ops.int8_ssd_scan(**(given | {"state": given["state"].float()}))
    y, state = int8_ssd_scan_state(**given)
    assert state.dtype == torch.bfloat16
    assert error(y, expected_y) < 4e-4
    # Twice the rounding error, since the interpreter cuts off.
    assert error(state.float(), expected_state) < 2**-7


def test_reverse(device: torch.device) -> None:
    check(operands(device, 75) | {"reverse": True}, chunk=16)


@pytest.mark.parametrize("name", ["x_scale", "dt_scale", "B_scale", "C_scale"])
def test_one_scale_a_tensor(device: torch.device, name: str) -> None:
    check(operands(device, 17) | {name: scales(size=0.02).to(device)})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x_scale", (2, 17, 1, 1)),
        ("x_scale", (2, 17, 4, 20)),
        ("dt_scale", (2, 17, 1)),
        ("B_scale", (2, 12)),
        ("C_scale", (2, 12)),
    ],
)
def test_scales_of_any_shape(device: torch.device, name: str, shape: tuple[int, ...]) -> None:
    # Rows that are not integers are rounded to float16, hence the state too.
    given = operands(device, 17, batch=2) | {name: scales(*shape, size=0.02).to(device)}
    check(given, state_error=4e-4)


def test_strong_and_weak_decay(device: torch.device) -> None:
    A = torch.tensor([-60.0, -1e-4, -16.0, 0.02])
    check(operands(device, 200) | {"A": A.to(device)}, state_error=1e-5, chunk=64)


def test_channels_and_steps_of_very_different_size(device: torch.device) -> None:
    given = operands(device, 100)
    given["x_scale"] = given["x_scale"] * 1e-5
    given["x_scale"][:, 0] *= 1e8
    given["dt_q"] = (given["dt_q"].sign() * 127).contiguous()
    given["dt_scale"] = given["dt_scale"] * 3
    check(given, state_error=1e-5)


def test_zeros(device: torch.device) -> None:
    given = operands(device, 20)
    given["x_q"] = torch.zeros_like(given["x_q"])
    y, state = int8_ssd_scan(**(given | {"state": None}))
    assert not y.any()
    assert not state.any()


def test_D_far_above_what_the_positions_give(device: torch.device) -> None:
    given = operands(device, 40)
    check(given | {"D": given["D"] * 1e6, "state": None})


def step_operands(device: torch.device, batch: int = 3, **sizes: int) -> Operands:
    given = operands(device, 1, batch, **sizes)
    groups = given["B_q"].shape[2]
    BC = torch.randn(batch, 1, 2 * given["B_q"][0].numel(), device=device)
    kept = ("x_q", "x_scale", "dt_q", "dt_scale", "A", "D", "dt_bias", "state")
    return {name: given[name] for name in kept} | {"BC": BC, "groups": groups}


def check_step(given: Operands, **how: Any) -> None:
    expected_y, expected_state = ops.ssd_scan_step(**given)
    y, state = ssd_scan_step(**given, **how)
    assert state is given["state"]
    assert error(y, expected_y) < 2e-6
    assert error(state, expected_state) < 1e-6


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("rows", [None, 4, 32])
def test_step(device: torch.device, batch: int, rows: int | None) -> None:
    check_step(step_operands(device, batch), rows=rows)


def test_step_of_a_published_head(device: torch.device) -> None:
    check_step(step_operands(device, 2, heads=3, width=64, groups=1, rank=128))


@pytest.mark.parametrize("absent", ["D", "dt_bias"])
def test_step_optional_operands(device: torch.device, absent: str) -> None:
    check_step(step_operands(device) | {absent: None})


def test_step_one_scale_a_tensor_and_limits(device: torch.device) -> None:
    names = ("x_scale", "dt_scale")
    given = step_operands(device) | {name: scales(size=0.02).to(device) for name in names}
    check_step(given | {"dt_min": 0.1, "dt_max": 0.3})


def test_step_of_zeros(device: torch.device) -> None:
    given = step_operands(device)
    given["BC"] = torch.zeros_like(given["BC"])
    check_step(given)


def test_step_of_a_state_in_bfloat16(device: torch.device) -> None:
    given = step_operands(device)
    given["state"] = given["state"].bfloat16()
    exact = given | {"state": given["state"].float()}
    expected_y, expected_state = ops.ssd_scan_step(**exact)
    y, state = ssd_scan_step(**given)
    assert error(y, expected_y) < 2e-6
    off = (state.float() - expected_state).abs()
    # Twice the rounding error, since the interpreter cuts off.
    assert bool((off <= expected_state.abs() * 2**-7).all())
