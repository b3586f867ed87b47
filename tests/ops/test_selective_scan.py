from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmc.ops import selective_scan

from .closeness import relative_error

Operands = dict[str, Tensor]


def operands(batch: int, length: int, width: int, rank: int) -> Operands:
    u, dt, z = torch.randn(3, batch, length, width)
    B, C = torch.randn(2, batch, length, rank)
    decay = {"A": -torch.rand(width, rank) * 8, "D": torch.randn(width)}
    carried = {"dt_bias": torch.randn(width), "state": torch.randn(batch, width, rank)}
    return {"u": u, "dt": dt, "B": B, "C": C, "z": z, **decay, **carried}


def reference(given: Operands, softplus: bool = True, reverse: bool = False) -> tuple[Tensor, ...]:
    """The recurrence in float64, one scalar step at a time; absent operands count as zero."""
    t = {name: tensor.double() for name, tensor in given.items()}
    dt = t["dt"] + t.get("dt_bias", 0.0)
    dt = F.softplus(dt) if softplus else dt
    y = t.get("D", 0.0) * t["u"]
    h = t.get("state", torch.zeros(len(dt), *t["A"].shape, dtype=torch.float64)).clone()
    batch, length, width = dt.shape
    steps = range(length)[::-1] if reverse else range(length)
    for b, d, i in product(range(batch), range(width), steps):
        step, B, C = dt[b, i, d], t["B"][b, i], t["C"][b, i]
        h[b, d] = torch.exp(step * t["A"][d]) * h[b, d] + step * B * t["u"][b, i, d]
        y[b, i, d] += C @ h[b, d]
    return (y * F.silu(t["z"]) if "z" in t else y), h


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert relative_error(a, b) < 2e-6


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 33])
def test_against_the_scalar_recurrence(length: int, reverse: bool) -> None:
    given = operands(2, length, 5, 3)
    assert_close(selective_scan(**given, reverse=reverse), reference(given, reverse=reverse))


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "state"])
def test_optional_operands(absent: str) -> None:
    given = operands(2, 9, 5, 3)
    del given[absent]
    assert_close(selective_scan(**given), reference(given))


def test_only_the_required_operands() -> None:
    given = operands(3, 7, 1, 1)
    given = {name: given[name] for name in ("u", "dt", "A", "B", "C")}
    assert_close(selective_scan(**given), reference(given))


def test_without_softplus_the_bias_is_still_added() -> None:
    given = operands(2, 9, 5, 3)
    given["dt"], given["dt_bias"] = given["dt"].abs(), given["dt_bias"].abs()
    assert_close(selective_scan(**given, softplus=False), reference(given, softplus=False))


@pytest.mark.parametrize("split", [1, 7, 40])
@pytest.mark.parametrize("reverse", [False, True])
def test_carried_state_continues_the_sequence(split: int, reverse: bool) -> None:
    given = operands(2, 63, 17, 16)
    whole, last = selective_scan(**given, reverse=reverse)
    along = {name: given.pop(name).split(split, dim=1) for name in ("u", "dt", "B", "C", "z")}
    state, outputs = given.pop("state"), {}
    order = range(len(along["u"]))
    for i in reversed(order) if reverse else order:
        part = {name: pieces[i] for name, pieces in along.items()}
        outputs[i], state = selective_scan(**part, **given, state=state, reverse=reverse)
    assert relative_error(torch.cat([outputs[i] for i in order], dim=1), whole) < 1e-6
    assert relative_error(state, last) < 1e-6


def test_longer_than_one_materialised_chunk() -> None:
    given = operands(4, 37, 513, 64)
    whole, _ = selective_scan(**given)
    sliced = {name: given[name][-1:] for name in ("u", "dt", "B", "C", "z", "state")}
    alone, _ = selective_scan(**{**given, **sliced})
    assert relative_error(alone, whole[-1:]) < 1e-6


def test_strided_operands() -> None:
    given = operands(2, 9, 6, 3)
    strided = {
        name: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
        for name, tensor in given.items()
    }
    assert_close(selective_scan(**strided), reference(given))


def test_a_long_strong_decay_stays_finite() -> None:
    given = operands(1, 200, 3, 2)
    given["A"] *= 1e4
    y, state = selective_scan(**given)
    assert y.isfinite().all()
    assert state.isfinite().all()


def test_gradients_flow_through_every_operand() -> None:
    batch, length, width, rank = 2, 5, 6, 3
    u, dt, z = (torch.randn(batch, length, width, requires_grad=True) for _ in range(3))
    B, C = (torch.randn(batch, length, rank, requires_grad=True) for _ in range(2))
    A = (-torch.rand(width, rank)).requires_grad_()
    y, state = selective_scan(u, dt, A, B, C, torch.ones(width), z)
    (y.sum() + state.sum()).backward()
    for operand in (u, dt, A, B, C, z):
        assert operand.grad is not None
        assert operand.grad.abs().sum() > 0
