"""The selective scan on floats, against the operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ssmc import ops
from ssmc.kernels.float_scan import selective_scan

ERROR = 2e-6  # relative; exponentials and the order of sums differ


def arguments(device: torch.device, batch: int, length: int, width: int, states: int) -> Any:
    """Operands of a scan, views of wider rows among them."""
    wide = torch.randn(batch, length, 2 * width, device=device)
    rows = torch.randn(batch, length, 2 * states, device=device)
    return {
        "u": wide[..., :width],
        "dt": torch.randn(batch, length, width, device=device) - 2,
        "A": -0.1 - 8 * torch.rand(width, states, device=device),
        "B": rows[..., :states],
        "C": rows[..., states:],
        "D": torch.randn(width, device=device),
        "z": wide[..., width:],
        "dt_bias": torch.randn(width, device=device),
        "state": torch.randn(batch, width, states, device=device),
    }


def agree(got: Tensor, expected: Tensor) -> None:
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert (got.double() - expected.double()).norm() <= ERROR * expected.double().norm()


def check(given: dict[str, Any]) -> None:
    """Against the definition in double precision."""
    exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()}
    for got, expected in zip(selective_scan(**given), ops.selective_scan(**exact), strict=True):
        agree(got, expected.float())


@pytest.mark.parametrize("shape", [(1, 1, 8, 16), (2, 11, 40, 16), (1, 5, 7, 5)])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan(shape: tuple[int, int, int, int], reverse: bool, device: torch.device) -> None:
    given = arguments(device, *shape)
    before = given["state"].clone()
    check(given | {"reverse": reverse})
    assert torch.equal(given["state"], before)


def test_a_scan_of_the_least_operands(device: torch.device) -> None:
    given = arguments(device, 2, 9, 8, 8)
    given["dt"].abs_()  # without softplus a step is to be positive
    check({name: given[name] for name in ("u", "dt", "A", "B", "C")} | {"softplus": False})


def test_channels_that_do_not_adjoin(device: torch.device) -> None:
    given = arguments(device, 1, 6, 8, 4)
    for name in ("u", "dt", "B", "C", "z"):
        given[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    check(given)


def test_no_token(device: torch.device) -> None:
    given = arguments(device, 2, 3, 8, 4)
    y, state = selective_scan(**{k: v[:, :0] if k in "u dt B C z" else v for k, v in given.items()})
    assert y.shape == (2, 0, 8)
    assert torch.equal(state, given["state"])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8, 512, 5120, 16), (2, 2048, 1536, 16)])
def test_the_sizes_of_models(shape: tuple[int, int, int, int], device: torch.device) -> None:
    check(arguments(device, *shape))
