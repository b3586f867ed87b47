"""The fused operators against dequantise, then the exact float operator: the same bits."""

import pytest
import torch
from torch import Tensor

from ssmc.errors import UsageError
from ssmc.ops import (
    causal_conv1d,
    dequantize,
    embedding,
    int8_causal_conv1d,
    int8_embedding,
    int8_linear,
    int8_selective_scan,
    int8_ssd_scan,
    linear,
    quantize,
    quantize_dynamic,
    selective_scan,
    ssd_scan,
)
from ssmc.quant.formats import quantize_weight, scale_for


def integers(*shape: int, saturated: bool) -> Tensor:
    if saturated:
        return torch.randint(0, 2, shape).mul(254).sub(127).to(torch.int8)
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def scale(*shape: int) -> Tensor:
    return scale_for(torch.rand(shape) ** 4 * 100 + 1e-3)


@pytest.mark.parametrize("saturated", [False, True])
@pytest.mark.parametrize("width", [1, 63, 1000, 8192])
@pytest.mark.parametrize("x_scale", [(), (33, 1)])
@pytest.mark.parametrize("w_scale", [(), (17, 1)])
def test_linear(
    x_scale: tuple[int, ...], w_scale: tuple[int, ...], width: int, saturated: bool
) -> None:
    x_q, w_q = integers(33, width, saturated=saturated), integers(17, width, saturated=saturated)
    s_x, s_w, bias = scale(*x_scale), scale(*w_scale), torch.randn(17)
    expected = linear(dequantize(x_q, s_x), dequantize(w_q, s_w), bias, exact=True)
    assert torch.equal(int8_linear(x_q, s_x, w_q, s_w, bias), expected)


def test_linear_sums_integers_exactly_at_the_extreme() -> None:
    q, one = torch.full((1, 8192), 127, dtype=torch.int8), torch.tensor(1.0)
    assert int8_linear(q, one, q, one).item() == 8192 * 127**2
    assert int8_linear(-q, one, q, one).item() == -8192 * 127**2


def test_linear_of_real_activations_and_weight() -> None:
    x, weight = torch.randn(2, 9, 1000) ** 3, torch.randn(63, 1000)
    (x_q, s_x), (w_q, s_w) = quantize_dynamic(x), quantize_weight(weight)
    expected = linear(dequantize(x_q, s_x), dequantize(w_q, s_w), exact=True)
    assert torch.equal(int8_linear(x_q, s_x, w_q, s_w), expected)


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("x_scale", [(), (13,)])
@pytest.mark.parametrize("w_scale", [(), (13, 1)])
@pytest.mark.parametrize("length", [1, 2, 63])
def test_conv(
    length: int, w_scale: tuple[int, ...], x_scale: tuple[int, ...], activation: str
) -> None:
    x_q, state_q = integers(2, length, 13, saturated=True), integers(2, 3, 13, saturated=False)
    w_q, bias = integers(13, 4, saturated=True), torch.randn(13)
    s_x, s_w = scale(*x_scale), scale(*w_scale)
    floats = dequantize(x_q, s_x), dequantize(w_q, s_w), bias, dequantize(state_q, s_x)
    y, state = causal_conv1d(*floats, activation, exact=True)
    y_q, new_state_q = int8_causal_conv1d(x_q, s_x, w_q, s_w, bias, state_q, activation)
    assert torch.equal(y_q, y)
    assert torch.equal(dequantize(new_state_q, s_x), state)


def test_conv_without_state_continues_in_parts() -> None:
    x_q, w_q, s = integers(2, 23, 13, saturated=False), integers(13, 4, saturated=False), scale(13)
    whole, last = int8_causal_conv1d(x_q, s, w_q, scale())
    assert last.dtype == torch.int8
    _, state = int8_causal_conv1d(x_q[:, :9], s, w_q, scale())
    assert torch.equal(state, x_q[:, 6:9])
    assert whole.shape == (2, 23, 13)


@pytest.mark.parametrize("shape", [(), (11, 1)])
def test_embedding(shape: tuple[int, ...]) -> None:
    w_q, s, ids = integers(11, 5, saturated=False), scale(*shape), torch.randint(11, (2, 7))
    assert torch.equal(int8_embedding(ids, w_q, s), embedding(ids, dequantize(w_q, s)))


@pytest.mark.parametrize("reverse", [False, True])
def test_selective_scan(reverse: bool) -> None:
    u, dt, z = torch.randn(3, 2, 33, 6)
    B, C = torch.randn(2, 2, 33, 5)
    A, D, bias, state = -torch.rand(6, 5), torch.randn(6), torch.randn(6), torch.randn(2, 6, 5)
    channel = scale_for(torch.tensor([1.0, 2, 3, 4, 5, 6]))
    (B_q, B_s), (C_q, C_s) = quantize_dynamic(B), quantize_dynamic(C)
    u_q, dt_q, z_q = (quantize(x, channel) for x in (u, dt, z))
    u, dt, z = (dequantize(q, channel) for q in (u_q, dt_q, z_q))
    B, C = dequantize(B_q, B_s), dequantize(C_q, C_s)
    expected = selective_scan(u, dt, A, B, C, D, z, bias, state, reverse=reverse)
    actual = int8_selective_scan(
        u_q, channel, dt_q, channel, A, B_q, B_s, C_q, C_s, D, z_q, channel, bias, state,
        reverse=reverse,
    )  # fmt: skip
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_a_gate_without_its_scale_is_refused() -> None:
    q, one = integers(1, 2, 3, saturated=False), torch.tensor(1.0)
    with pytest.raises(UsageError, match="z_q and z_scale"):
        int8_selective_scan(q, one, q, one, -torch.ones(3, 3), q, one, q, one, z_q=q)


def test_ssd_scan() -> None:
    x, dt, B = torch.randn(2, 70, 4, 3), torch.randn(2, 70, 4), torch.randn(2, 70, 2, 5)
    A, D, bias, state = -torch.rand(4), torch.randn(4), torch.randn(4), torch.randn(2, 4, 3, 5)
    x_s, dt_s, B_s = scale_for(x.abs().amax((0, 1))), scale_for(dt.abs().amax()), scale(2, 70, 1, 1)
    x_q, dt_q, B_q = quantize(x, x_s), quantize(dt, dt_s), quantize(B, B_s)
    x, dt, B = dequantize(x_q, x_s), dequantize(dt_q, dt_s), dequantize(B_q, B_s)
    expected = ssd_scan(x, dt, A, B, B, D, bias, state, 0.1, 2.0)
    actual = int8_ssd_scan(x_q, x_s, dt_q, dt_s, A, B_q, B_s, B_q, B_s, D, bias, state, 0.1, 2.0)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
