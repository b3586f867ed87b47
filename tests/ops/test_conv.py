import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmc.errors import UsageError
from ssmc.ops import causal_conv1d
from ssmc.quant.formats import (
    dequantize_tensor,
    quantize_tensor,
    quantize_weight,
    scale_for,
)

from .closeness import relative_error


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    channels, taps = weight.shape
    padded = F.pad(x.double().mT, (taps - 1, 0))
    bias = None if bias is None else bias.double()
    return F.conv1d(padded, weight.double()[:, None], bias, groups=channels).mT


def in_parts(
    x: Tensor, weight: Tensor, split: int, activation: str, exact: bool
) -> tuple[Tensor, Tensor]:
    state, outputs = torch.zeros(2, 3, 13), []
    for part in x.split(split, dim=1):
        y, state = causal_conv1d(part, weight, None, state, activation, exact)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("taps", [1, 2, 4, 5])
@pytest.mark.parametrize("length", [1, 2, 63])
def test_against_torch(length: int, taps: int, exact: bool) -> None:
    x, weight, bias = torch.randn(3, length, 13), torch.randn(13, taps), torch.randn(13)
    expected = reference(x, weight, bias)
    plain, _ = causal_conv1d(x, weight, bias, exact=exact)
    gated, _ = causal_conv1d(x, weight, bias, activation="silu", exact=exact)
    assert relative_error(plain, expected) < 1e-6
    assert relative_error(gated, expected * expected.sigmoid()) < 1e-6
    bare, _ = causal_conv1d(x, weight)
    assert relative_error(bare, reference(x, weight, None)) < 1e-6


def test_exact_rounds_once_before_the_bias() -> None:
    x, weight, bias = torch.randn(3, 63, 13), torch.randn(13, 4), torch.randn(13)
    y, _ = causal_conv1d(x, weight, bias, exact=True)
    assert torch.equal(y, reference(x, weight, None).float() + bias)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("split", [1, 2, 3, 10, 22])
def test_carried_state_continues_the_sequence(split: int, exact: bool) -> None:
    x, weight = torch.randn(2, 23, 13), torch.randn(13, 4)
    whole, last = causal_conv1d(x, weight, activation="silu", exact=exact)
    outputs, state = in_parts(x, weight, split, "silu", exact)
    assert relative_error(outputs, whole) < 1e-6
    assert torch.equal(state, last)
    assert torch.equal(last, x[:, -3:])


@pytest.mark.parametrize("split", [1, 2, 3, 10, 22])
def test_exact_sums_of_quantised_operands_do_not_depend_on_the_split(split: int) -> None:
    x, weight = torch.randn(2, 23, 13), torch.randn(13, 4)
    scale = scale_for(x.abs().amax((0, 1)))
    x = dequantize_tensor(quantize_tensor(x, scale), scale)
    weight = dequantize_tensor(*quantize_weight(weight))
    whole, _ = causal_conv1d(x, weight, exact=True)
    assert torch.equal(in_parts(x, weight, split, "none", True)[0], whole)


def test_state_of_a_short_sequence_keeps_older_inputs() -> None:
    x, state = torch.randn(2, 1, 5), torch.randn(2, 3, 5)
    _, new_state = causal_conv1d(x, torch.randn(5, 4), None, state)
    assert torch.equal(new_state, torch.cat([state[:, 1:], x], dim=1))


def test_unknown_activation() -> None:
    with pytest.raises(UsageError, match="unknown activation 'tanh'") as raised:
        causal_conv1d(torch.ones(1, 2, 3), torch.ones(3, 4), activation="tanh")
    assert "silu" in str(raised.value.hint)
