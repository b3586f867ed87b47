"""The selective scan of a prompt and of one step, against the operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ssmc.errors import UsageError
from ssmc.kernels import selective_scan_warps
from ssmc.kernels.selective_scan import int8_selective_scan
from ssmc.kernels.selective_step import selective_scan_step
from ssmc.ops import fused_linear, int8, steps
from ssmc.ops.quantize import quantize_dynamic
from ssmc.quant.formats import bf16_up, pack

ERROR = 1e-5  # relative; exponentials and the order of sums differ


def integers(device: torch.device, *shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)


def scales(device: torch.device, *shape: int) -> Tensor:
    return bf16_up(0.01 + 0.02 * torch.rand(shape, device=device))


def agree(got: Tensor, expected: Tensor, error: float = ERROR) -> None:
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert (got.double() - expected.double()).norm() <= error * expected.double().norm()


def prompt(
    device: torch.device, batch: int, length: int, width: int, states: int, bare: bool = False
) -> dict[str, Any]:
    """Arguments of a scan; z and u are views of wider rows. Bare: scales and operands left out."""
    wide = integers(device, batch, length, 2 * width)
    arguments: dict[str, Any] = {
        "u_q": wide[..., :width],
        "u_scale": scales(device, *(() if bare else (width,))),
        "dt_q": integers(device, batch, length, width),
        "dt_scale": scales(device, *(() if bare else (width,))),
        "A": -0.1 - 8 * torch.rand(width, states, device=device),
    }
    for name in ("B", "C"):
        arguments[f"{name}_q"] = integers(device, batch, length, states)
        shape = () if bare else (batch, length, 1)
        arguments[f"{name}_scale"] = scales(device, *shape)
    if not bare:
        D, dt_bias = torch.randn(2, width, device=device)
        arguments |= {"D": D, "dt_bias": dt_bias}
        arguments |= {"z_q": wide[..., width:], "z_scale": scales(device, width)}
        arguments["state"] = torch.randn(batch, width, states, device=device)
    return arguments


def check_prompt(arguments: dict[str, Any], **launch: int) -> None:
    given = arguments.get("state")
    before = None if given is None else given.clone()
    y, new_state = int8_selective_scan(**arguments, **launch)
    expected_y, expected_state = int8.int8_selective_scan(**arguments)
    agree(y, expected_y)
    agree(new_state, expected_state)
    assert given is None or before is None or torch.equal(given, before)


@pytest.mark.parametrize("shape", [(1, 1, 8, 16), (2, 11, 12, 16), (1, 5, 7, 5)])
@pytest.mark.parametrize("reverse", [False, True])
def test_prompt(shape: tuple[int, int, int, int], reverse: bool, device: torch.device) -> None:
    check_prompt(prompt(device, *shape) | {"reverse": reverse}, block_t=4)


def test_prompt_of_bare_operands(device: torch.device) -> None:
    arguments = prompt(device, 1, 9, 8, 8, bare=True)
    arguments["dt_q"].abs_()  # without softplus a step is to be positive
    check_prompt(arguments | {"softplus": False}, block_d=4, block_t=8)


def test_prompt_goes_on_from_a_state(device: torch.device) -> None:
    arguments = prompt(device, 1, 12, 8, 8)
    y, state = int8_selective_scan(**arguments)
    parts = []
    for part in (slice(0, 5), slice(5, 12)):
        names = ("u_q", "dt_q", "z_q", "B_q", "B_scale", "C_q", "C_scale")
        cut = {name: arguments[name][:, part] for name in names}
        y_part, arguments["state"] = int8_selective_scan(**(arguments | cut))
        parts.append(y_part)
    agree(torch.cat(parts, 1), y)
    agree(arguments["state"], state)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "launch"),
    [
        ((40, 101, 160, 16), {"lanes": 4}),
        ((40, 70, 152, 16), {"lanes": 8, "block_t": 32}),
        ((1, 33, 4100, 16), {}),
        ((1, 90, 32, 64), {"lanes": 4}),
        ((1, 50, 260, 4), {"lanes": 1}),
    ],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_prompt_by_lanes(
    shape: tuple[int, int, int, int], launch: dict[str, int], reverse: bool, device: torch.device
) -> None:
    check_prompt(prompt(device, *shape) | {"reverse": reverse}, **launch)


@pytest.mark.parametrize(("blocks", "groups"), [(160, 128), (10, 4), (132, 7), (5000, 3), (133, 1)])
def test_shares_cut_a_block_at_most_once(blocks: int, groups: int) -> None:
    share = selective_scan_warps.share(blocks, groups, 132)
    cuts = {cut // groups for cut in range(0, blocks * groups, share) if cut % groups}
    assert share >= groups
    assert len(cuts) == sum(cut % groups > 0 for cut in range(0, blocks * groups, share))
    assert share * 132 >= blocks * groups


def test_states_too_many_for_a_warp() -> None:
    assert selective_scan_warps.constants(16, 4, 4, 16) == {
        "LANES": 4, "SHARE": 4, "T": 16, "num_warps": 4,
    }  # fmt: skip
    assert selective_scan_warps.constants(256, 4, 4, 16) is None


def test_gate_without_a_scale(device: torch.device) -> None:
    arguments = prompt(device, 1, 2, 8, 8) | {"z_scale": None}
    with pytest.raises(UsageError, match="together"):
        int8_selective_scan(**arguments)


def step(
    device: torch.device, batch: int, width: int, states: int, rank: int, bare: bool = False
) -> dict[str, Any]:
    """Arguments of a step; u, z and x_proj are views of wider rows."""
    wide = integers(device, batch, 1, 2 * width)
    D, dt_bias, proj_bias = torch.randn(3, width, device=device)
    return {
        "x_proj": torch.randn(batch, 1, rank + 2 * states + 3, device=device)[..., 3:],
        "dt_w_q": integers(device, width, rank),
        "dt_w_scale": 0.1 * scales(device) if bare else bf16_up(0.1 * scales(device, width, 1)),
        "dt_proj_bias": None if bare else proj_bias,
        "dt_scale": scales(device, *(() if bare else (width,))),
        "u_q": wide[..., :width],
        "u_scale": scales(device, width),
        "A": -0.1 - 8 * torch.rand(width, states, device=device),
        "D": None if bare else D,
        "z_q": None if bare else wide[..., width:],
        "z_scale": None if bare else scales(device, width),
        "dt_bias": None if bare else dt_bias,
        "state": torch.randn(batch, width, states, device=device),
        "softplus": True,
    }


def reference(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The operator's composition, also of a packed weight."""
    a = arguments
    states = a["A"].shape[1]
    sizes = [a["x_proj"].shape[-1] - 2 * states, states, states]
    low, B, C = a["x_proj"].split(sizes, -1)
    dt_q = fused_linear.int8_linear_quantize(
        *quantize_dynamic(low), a["dt_w_q"], a["dt_w_scale"], a["dt_proj_bias"], a["dt_scale"]
    )
    operands = (a["u_q"], a["u_scale"], dt_q, a["dt_scale"], a["A"])
    pairs = (*quantize_dynamic(B), *quantize_dynamic(C))
    rest = (a["D"], a["z_q"], a["z_scale"], a["dt_bias"], a["state"], a["softplus"])
    return int8.int8_selective_scan(*operands, *pairs, *rest)


def check_step(
    arguments: dict[str, Any], expected: tuple[Tensor, Tensor], error: float, **launch: int
) -> None:
    y, state = selective_scan_step(**arguments, **launch)
    assert state is arguments["state"]
    agree(y, expected[0])
    agree(state, expected[1], error)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(
    ("shape", "sequences"),
    [
        ((1, 48, 16, 8), None),
        ((3, 37, 8, 5), 1),
        ((5, 32, 16, 4), 4),
        ((18, 40, 16, 20), None),
        ((17, 21, 5, 70), 16),
        ((16, 16, 32, 33), 16),
    ],
)
def test_step(
    shape: tuple[int, int, int, int], sequences: int | None, bare: bool, device: torch.device
) -> None:
    arguments = step(device, *shape, bare=bare)
    expected = steps.selective_scan_step(**arguments)
    launch = {} if sequences is None else {"sequences": sequences, "block_d": 16}
    check_step(arguments, expected, ERROR, **launch)


@pytest.mark.parametrize(("rank", "group"), [(32, 8), (48, 16)])
def test_step_with_a_packed_weight(rank: int, group: int, device: torch.device) -> None:
    width = 40
    arguments = step(device, 2, width, 16, rank)
    q = torch.randint(-8, 8, (width, rank), dtype=torch.int8, device=device)
    arguments["dt_w_q"] = pack(q, 4, group)
    arguments["dt_w_scale"] = scales(device, width, rank // group)
    check_step(arguments, reference(arguments), ERROR)


@pytest.mark.parametrize("batch", [2, 19])
def test_step_of_a_state_in_16_bits(batch: int, device: torch.device) -> None:
    arguments = step(device, batch, 32, 16, 8)
    arguments["state"] = arguments["state"].bfloat16()
    expected = steps.selective_scan_step(**arguments)
    check_step(arguments, expected, 2**-7)  # the interpreter cuts off instead of rounding
