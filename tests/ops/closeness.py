from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the Frobenius norm, in float64."""
    assert actual.shape == expected.shape
    difference = actual.double() - expected.double()
    return float(difference.norm() / expected.double().norm())
