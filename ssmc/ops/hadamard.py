"""Rotation of the last dimension by an orthonormal Hadamard matrix."""

from __future__ import annotations

from torch import Tensor

from ssmc.ops.registry import operator
from ssmc.quant.rotation import check_block, rotate


def _fake(x: Tensor, block: int) -> Tensor:
    check_block(x.shape[-1], block)
    return x.new_empty(x.shape)


@operator(_fake)
def hadamard(x: Tensor, block: int) -> Tensor:
    """Each run of `block` channels of x [..., n] times the orthonormal Hadamard matrix.

    y = H x / sqrt(block) with H = `ssmc.quant.rotation.hadamard_matrix(block)`. Applied to the
    input and to the rows of the weight of a linear layer it leaves the product unchanged. Raises
    NoHadamard for an order that has no known construction, UsageError where block does not
    divide n.
    """
    return rotate(x, block)
