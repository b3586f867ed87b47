import pytest
import torch
from torch import Tensor

from ssmc.errors import UsageError
from ssmc.quant.rotation import NoHadamard, hadamard_matrix, largest_block, rotate

# Orders up to 600 with no Paley or Sylvester construction over fields of p or p^2 elements.
UNKNOWN = [
    *(92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292, 324, 344, 356, 372, 376, 404),
    *(412, 428, 436, 452, 472, 476, 508, 520, 532, 536, 584, 596),
]
WIDTHS = [768, 1536, 2560, 3584, 4480, 5120, 7168]


def known(limit: int) -> list[int]:
    return [n for n in range(1, limit + 1) if largest_block(n) == n]


def assert_hadamard(matrix: Tensor, n: int) -> None:
    assert matrix.shape == (n, n)
    assert torch.all(matrix.abs() == 1)
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n))


def test_every_known_order_up_to_600() -> None:
    for n in known(600):
        assert_hadamard(hadamard_matrix(n), n)


def test_known_orders_are_1_2_and_all_multiples_of_4_but_a_few() -> None:
    candidates = [1, 2, *range(4, 601, 4)]
    assert known(600) == [n for n in candidates if n not in UNKNOWN]


@pytest.mark.parametrize("n", WIDTHS)
def test_widths_of_models(n: int) -> None:
    matrix = hadamard_matrix(n)
    rows = torch.randperm(n)[:64]
    expected = n * torch.nn.functional.one_hot(rows, n).float()
    assert torch.equal(matrix[rows] @ matrix.T, expected)
    assert torch.all(matrix.abs() == 1)


def test_powers_of_two_are_sylvester() -> None:
    for k in range(8):
        index = torch.arange(2**k)
        common = index[:, None] & index
        parity = sum((common >> bit) & 1 for bit in range(k)) % 2 if k else 0 * common
        assert torch.equal(hadamard_matrix(2**k), (1 - 2 * parity).float())


def test_the_same_order_gives_the_same_matrix_on_any_ambient_device() -> None:
    first = hadamard_matrix(140)
    first[0, 0] = 7
    with torch.device("meta"):
        second = hadamard_matrix(140)
    assert second.device.type == "cpu"
    assert_hadamard(second, 140)


@pytest.mark.parametrize("n", [0, -4, 3, 6, 92, 668])
def test_unknown_orders_are_named(n: int) -> None:
    with pytest.raises(NoHadamard, match=f"order {n} ") as raised:
        hadamard_matrix(n)
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value, UsageError)


@pytest.mark.parametrize(
    ("n", "block"), [(1, 1), (7, 1), (768, 768), (92, 4), (130, 2), (5888, 5888)]
)
def test_largest_block(n: int, block: int) -> None:
    assert largest_block(n) == block


@pytest.mark.parametrize("n", [64, 140, 768])
def test_rotate_is_orthonormal_and_keeps_the_type(n: int) -> None:
    identity = torch.eye(n, dtype=torch.float64)
    rows = rotate(identity, n)
    assert rows.dtype == torch.float64
    assert torch.allclose(rows @ rows.T, identity, rtol=0, atol=n * 2**-53)
    assert torch.allclose(rows * n**0.5, hadamard_matrix(n).double().T, rtol=1e-14, atol=0)
