import pytest
import torch

from ssmc.ops import dequantize, quantize, quantize_dynamic
from ssmc.quant.formats import qmax, scale_for


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("shape", [(7,), (), (2, 5, 1)])
def test_static_rounds_saturates_and_broadcasts(shape: tuple[int, ...], bits: int) -> None:
    x = torch.randn(2, 5, 7) * 3
    scale = scale_for(torch.rand(shape) + 0.5, bits)
    expected = (x.double() / scale.double()).round().clamp(-qmax(bits), qmax(bits))
    assert torch.equal(quantize(x, scale, bits), expected.to(torch.int8))
    assert expected.abs().max() == qmax(bits)


def test_half_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert quantize(x, torch.tensor(1.0)).tolist() == [0, 2, 2, 0, -2, -2]


@pytest.mark.parametrize("bits", [8, 4])
def test_dynamic_has_a_scale_for_each_token(bits: int) -> None:
    x = torch.randn(2, 5, 63) * torch.logspace(-20, 20, 5)[:, None]
    q, scale = quantize_dynamic(x, bits)
    assert torch.equal(scale, scale_for(x.abs().max(-1, keepdim=True).values, bits))
    assert torch.equal(q, quantize(x, scale, bits))
    assert torch.all(q.abs().amax(-1) >= qmax(bits) - 1)


def test_zero_tokens_give_zeros() -> None:
    x = torch.zeros(2, 3, 5)
    x[0, 0] = torch.randn(5)
    q, scale = quantize_dynamic(x)
    assert torch.all(q[1] == 0)
    assert torch.all(scale > 0)
    assert scale.reciprocal().isfinite().all()
    assert torch.equal(dequantize(q, scale)[1], x[1])


def test_dequantize_is_exact() -> None:
    q = torch.arange(-127, 128, dtype=torch.int8)
    scale = scale_for(torch.rand(64, 1) * torch.logspace(-30, 30, 64)[:, None])
    assert torch.equal(dequantize(q, scale).double(), q.double() * scale.double())
