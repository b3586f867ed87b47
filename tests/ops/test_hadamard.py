import pytest
import torch

from ssmc.errors import UsageError
from ssmc.ops import hadamard, linear
from ssmc.quant.rotation import NoHadamard, hadamard_matrix

from .closeness import relative_error


@pytest.mark.parametrize("n", [1, 2, 12, 28, 40, 256, 384, 1536])
def test_is_the_product_with_the_matrix(n: int) -> None:
    x = torch.randn(2, 3, n)
    expected = x.double() @ hadamard_matrix(n).double().T / n**0.5
    assert relative_error(hadamard(x, n), expected) < 1e-6


@pytest.mark.parametrize("block", [1, 4, 12, 20, 60])
def test_blocks_are_rotated_each_for_itself(block: int) -> None:
    x = torch.randn(5, 60)
    parts = [hadamard(part, block) for part in x.split(block, dim=-1)]
    assert relative_error(hadamard(x, block), torch.cat(parts, dim=-1)) < 1e-6


@pytest.mark.parametrize("block", [12, 20, 28, 48, 256, 768])
def test_a_row_has_the_same_bits_in_any_batch(block: int) -> None:
    x = torch.randn(700, 3, 2 * block)
    whole = hadamard(x, block)
    assert torch.equal(hadamard(x[431:432, 1], block), whole[431:432, 1])
    assert torch.equal(hadamard(x[17:30], block), whole[17:30])
    assert torch.equal(hadamard(x[..., block:], block), whole[..., block:])


@pytest.mark.parametrize("block", [64, 768])
def test_rotating_input_and_weight_leaves_a_linear_layer_unchanged(block: int) -> None:
    x, weight = torch.randn(63, 768), torch.randn(31, 768)
    rotated = linear(hadamard(x, block), hadamard(weight, block))
    assert relative_error(rotated, x.double() @ weight.double().T) < 2e-6


@pytest.mark.parametrize("block", [8, 12, 24])
def test_its_gradient_is_the_transposed_product(block: int) -> None:
    x, weight = torch.randn(3, 24, requires_grad=True), torch.randn(3, 24)
    (gradient,) = torch.autograd.grad(hadamard(x, block), x, weight)
    runs = weight.double().unflatten(1, (-1, block)) @ hadamard_matrix(block).double()
    assert relative_error(gradient, runs.flatten(1) / block**0.5) < 1e-6


def test_spreads_an_outlier_evenly() -> None:
    x = torch.zeros(768)
    x[5] = 1000.0
    assert torch.allclose(hadamard(x, 768).abs(), torch.full((768,), 1000 / 768**0.5))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_impossible_blocks(device: str) -> None:
    with pytest.raises(NoHadamard, match="order 6 "):
        hadamard(torch.ones(12, device=device), 6)
    with pytest.raises(UsageError, match="block of 8 does not divide a width of 12") as raised:
        hadamard(torch.ones(12, device=device), 8)
    assert raised.value.hint == "the largest block that does is 12"
