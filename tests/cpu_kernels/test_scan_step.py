"""A step of Mamba's scan with what is in front of it, in one kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssmc.errors import UsageError
from ssmc.quant.formats import quantize_weight

from .test_kernels import check, integers, kernel, scales

pytest.importorskip("numba")


def operands(batch: int, width: int, rank: int, low: int) -> tuple[Any, ...]:
    """Of the step from dt_proj on."""
    u_q, z_q = integers(batch, 1, 2 * width).split([width, width], -1)
    dt_proj = (*quantize_weight(torch.randn(width, low)), torch.randn(width), scales(width))
    A, D, bias = -0.1 - 8 * torch.rand(width, rank), *torch.randn(2, width)
    rest = (u_q, scales(width), A, D, z_q, scales(width), bias)
    return *dt_proj, *rest, torch.randn(batch, width, rank), True


@pytest.mark.parametrize(
    ("batch", "width", "rank", "low"), [(1, 64, 16, 16), (3, 45, 16, 3), (2, 96, 5, 70)]
)
def test_steps(batch: int, width: int, rank: int, low: int) -> None:
    x_proj = torch.randn(batch, 1, low + 2 * rank)
    given = operands(batch, width, rank, low)
    check("selective_scan_step", x_proj, *given)
    weights = (torch.rand(low), None, torch.rand(rank))
    check("normed_selective_scan_step", x_proj, *weights, 1e-6, *given)


def test_a_step_writes_over_its_state() -> None:
    given = operands(1, 32, 16, 4)
    state = given[-2]
    before = state.clone()
    _, new = kernel("normed_selective_scan_step")(
        torch.randn(1, 1, 36), None, None, None, 1e-6, *given
    )
    assert new.data_ptr() == state.data_ptr()
    assert not torch.equal(state, before)


def test_a_gate_without_its_scale_is_refused() -> None:
    given = list(operands(1, 32, 16, 4))
    given[9] = None
    with pytest.raises(UsageError, match="come together"):
        kernel("selective_scan_step")(torch.randn(1, 1, 36), *given)
