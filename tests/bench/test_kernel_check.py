"""What tells a right kernel from a wrong one, before any is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases.case import Case
from kernel_cases.check import check, reference, twin
from kernel_cases.measure import floor_us
from torch import Tensor

Result = tuple[Tensor, Tensor]


def scaled(x: Tensor, state: Tensor) -> Result:
    """The operator of the tests: a product and its integers."""
    y = 3 * x + state
    return y, y.round().to(torch.int8)


def inputs(device: torch.device) -> tuple[Any, ...]:
    return torch.randn(5, 14, device=device)[:, 3:10], 20 * torch.randn(5, 7, device=device)


CASE = Case("scaled", scaled, scaled, inputs, bytes=4.3e6, operations=1e9, unit="bf16")


def problem(kernel: Callable[..., Any], **changes: Any) -> str:
    given = inputs(torch.device("cpu"))
    case = replace(CASE, kernel=kernel, **changes)
    return check(case, given, reference(case, given), {}).problem


def unwritten(x: Tensor, state: Tensor) -> Result:
    y, q = scaled(x, state)
    out = torch.empty_like(y)
    out[:-1] = y[:-1]
    return out, q


def unwritten_integers(x: Tensor, state: Tensor) -> Result:
    y, q = scaled(x, state)
    out = torch.empty_like(q)
    out[1:] = q[1:]
    return y, out


def overwriting(x: Tensor, state: Tensor) -> Result:
    found = scaled(x, state)
    x.zero_()
    return found


def in_place(x: Tensor, state: Tensor) -> Result:
    y, q = scaled(x, state)
    return state.copy_(y), q


def off_by_one(x: Tensor, state: Tensor) -> Result:
    y, q = scaled(x, state)
    q[0, 0] += 1
    return y, q


def not_a_number(x: Tensor, state: Tensor) -> Result:
    y, q = scaled(x, state)
    return torch.where(y == y[0, 0], torch.nan, y), q


def of_other_type(x: Tensor, state: Tensor) -> Result:
    y, q = scaled(x, state)
    return y.double(), q


@pytest.mark.parametrize("kernel", [scaled, in_place])
def test_right(kernel: Callable[..., Any]) -> None:
    assert problem(kernel) == ""


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (unwritten, "result 0"),
        (unwritten_integers, "result 1"),
        (overwriting, "input 0 was written over"),
        (off_by_one, "result 1: error 0.0e+00, differing 2.9e-02"),
        (not_a_number, "result 0: error nan"),
        (of_other_type, "float64"),
        (lambda x, state: scaled(x, state)[0], "1 results, expected 2"),
    ],
)
def test_wrong(kernel: Callable[..., Any], words: str) -> None:
    assert words in problem(kernel)


def test_what_a_case_allows() -> None:
    assert problem(off_by_one, flips=0.03) == ""
    assert problem(lambda x, state: scaled(1.001 * x, state), error=1e-2, flips=0.1) == ""
    assert "inf" in problem(lambda x, state: scaled(x, state + 2), error=1, flips=1)


def test_twin_keeps_strides_and_shares_nothing() -> None:
    x = torch.arange(12.0).view(3, 4)[:, 1:3]
    other = twin(x)
    assert torch.equal(other, x)
    assert other.stride() == x.stride()
    other.zero_()
    assert x.count_nonzero() == 6
    assert twin(None) is None


def test_floor() -> None:
    assert floor_us(CASE) == pytest.approx(1.2658, rel=1e-3)  # 1e9 operations at 790 TFLOP/s
    assert floor_us(replace(CASE, operations=0.0)) == pytest.approx(1.0)
