"""The embedding kernel gives the operator's bits."""

from __future__ import annotations

import pytest
import torch

from ssmc import ops
from ssmc.kernels.embedding import int8_embedding
from ssmc.quant.formats import quantize_weight


@pytest.mark.parametrize("width", [64, 63, 1000])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7)])
def test_rows(width: int, granularity: str, shape: tuple[int, int], device: torch.device) -> None:
    w_q, w_scale = quantize_weight(torch.randn(50, width, device=device), granularity)
    ids = torch.randint(50, shape, device=device)
    expected = ops.int8_embedding(ids, w_q, w_scale)
    assert torch.equal(int8_embedding(ids, w_q, w_scale), expected)
    # ids of another stride: a column of a longer prompt
    column = torch.cat([ids, ids], 1)[:, ::2]
    assert torch.equal(
        int8_embedding(column, w_q, w_scale), ops.int8_embedding(column, w_q, w_scale)
    )
