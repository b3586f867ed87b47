import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmc.ops import ssd_scan
from ssmc.ops.ssd_scan import naive

from .closeness import relative_error

Operands = dict[str, Tensor]


def operands(length: int, groups: int = 2, heads: int = 4) -> Operands:
    x = torch.randn(3, length, heads, 7)
    dt = torch.randn(3, length, heads)
    B, C = torch.randn(2, 3, length, groups, 5)
    A, D, dt_bias = -torch.rand(heads) * 4, torch.randn(heads), torch.randn(heads)
    state = torch.randn(3, heads, 7, 5)
    return {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias, "state": state}


def reference(given: Operands, low: float = 0.0, high: float = math.inf) -> tuple[Tensor, Tensor]:
    """The recurrence in float64, head by head."""
    t = {name: tensor.double() for name, tensor in given.items()}
    dt = F.softplus(t["dt"] + t.get("dt_bias", 0.0)).clamp(low, high)
    batch, length, heads, width = t["x"].shape
    share = heads // t["B"].shape[2]
    zeros = torch.zeros(batch, heads, width, t["B"].shape[3], dtype=torch.float64)
    h, y = t.get("state", zeros).clone(), torch.zeros_like(t["x"])
    for i in range(length):
        for head in range(heads):
            step, B, C = dt[:, i, head], t["B"][:, i, head // share], t["C"][:, i, head // share]
            update = (step[:, None] * t["x"][:, i, head]).unsqueeze(2) * B.unsqueeze(1)
            h[:, head] = (step * t["A"][head]).exp()[:, None, None] * h[:, head] + update
            y[:, i, head] = (h[:, head] * C.unsqueeze(1)).sum(2)
    return y + t["D"][:, None] * t["x"] if "D" in t else y, h


def assert_close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert relative_error(a, b) < 2e-6


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 150])
def test_chunks_and_steps_against_float64(length: int, groups: int) -> None:
    given = operands(length, groups)
    expected = reference(given)
    assert_close(ssd_scan(**given), expected)
    assert_close(naive(**given), expected)


@pytest.mark.parametrize("absent", ["D", "dt_bias", "state"])
def test_optional_operands(absent: str) -> None:
    given = operands(70)
    del given[absent]
    assert_close(ssd_scan(**given), reference(given))


def test_step_limits() -> None:
    given = operands(70)
    assert_close(ssd_scan(**given, dt_min=0.3, dt_max=0.9), reference(given, 0.3, 0.9))


def test_reverse_is_the_scan_of_the_flipped_sequence() -> None:
    given = operands(70)
    flipped = {**given, **{name: given[name].flip(1) for name in ("x", "dt", "B", "C")}}
    y, state = reference(flipped)
    assert_close(ssd_scan(**given, reverse=True), (y.flip(1), state))
    assert_close(naive(**given, reverse=True), (y.flip(1), state))


@pytest.mark.parametrize("split", [1, 7, 64, 100])
def test_carried_state_continues_the_sequence(split: int) -> None:
    given = operands(131)
    whole = ssd_scan(**given)
    along = {name: given.pop(name).split(split, dim=1) for name in ("x", "dt", "B", "C")}
    state, outputs = given.pop("state"), []
    for pieces in zip(*along.values(), strict=True):
        part = dict(zip(along, pieces, strict=True))
        y, state = ssd_scan(**part, **given, state=state)
        outputs.append(y)
    assert_close((torch.cat(outputs, dim=1), state), whole)


def test_strong_and_weak_decays_keep_their_precision() -> None:
    given = operands(200)
    given["A"] = torch.tensor([-1e4, -30.0, -1e-3, 0.0])
    assert_close(ssd_scan(**given), reference(given))
