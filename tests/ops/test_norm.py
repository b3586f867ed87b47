import pytest
import torch
from torch import Tensor

from ssmc.errors import UsageError
from ssmc.ops import layer_norm, rms_norm, rms_norm_gated

from .closeness import relative_error


def reference(x: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()


@pytest.mark.parametrize("width", [1, 63, 1000])
def test_rms_norm(width: int) -> None:
    x, weight = torch.randn(2, 3, width), torch.randn(width)
    expected = reference(x.double(), 1e-5)
    assert relative_error(rms_norm(x), expected) < 1e-6
    assert relative_error(rms_norm(x, weight), expected * weight) < 1e-6


@pytest.mark.parametrize("width", [2, 63, 1000])
def test_layer_norm_is_rms_norm_of_what_has_no_mean(width: int) -> None:
    x, weight, bias = torch.randn(2, 3, width) + 5, torch.randn(width), torch.randn(width)
    expected = reference(x.double() - x.double().mean(-1, keepdim=True), 1e-5)
    assert relative_error(layer_norm(x), expected) < 1e-5
    assert relative_error(layer_norm(x, weight, bias), expected * weight + bias) < 1e-5


def test_eps_rules_small_rows() -> None:
    x = torch.full((1, 1, 7), 1e-8)
    assert relative_error(rms_norm(x, eps=1.0), x) < 1e-6
    assert torch.equal(rms_norm(torch.zeros(1, 7)), torch.zeros(1, 7))


@pytest.mark.parametrize("group_size", [None, 21, 63])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_rms_norm_gated(group_size: int | None, norm_before_gate: bool) -> None:
    x, gate, weight = torch.randn(2, 3, 63), torch.randn(2, 3, 63), torch.randn(63)
    silu = gate.double() / (1 + (-gate.double()).exp())
    inner = x.double() if norm_before_gate else x.double() * silu
    groups = inner.split(group_size or 63, dim=-1)
    expected = torch.cat([reference(group, 1e-6) for group in groups], dim=-1) * weight
    expected = expected * silu if norm_before_gate else expected
    actual = rms_norm_gated(x, gate, weight, 1e-6, group_size, norm_before_gate)
    assert relative_error(actual, expected) < 1e-6


def test_without_a_gate_and_with_one_group_it_is_rms_norm() -> None:
    x, weight = torch.randn(2, 3, 63), torch.randn(63)
    assert torch.equal(rms_norm_gated(x, None, weight), rms_norm(x, weight))


def test_groups_must_divide_the_width() -> None:
    with pytest.raises(UsageError, match="group_size 20 does not divide the width 63"):
        rms_norm_gated(torch.randn(2, 63), None, torch.ones(63), group_size=20)
