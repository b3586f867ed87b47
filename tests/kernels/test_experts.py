"""int8 products with the weights of chosen experts, against the operator: equal bits."""

from __future__ import annotations

import pytest
import torch

from ssmc import ops
from ssmc.kernels.experts import FEW, int8_expert_linear
from ssmc.quant.formats import bf16_up

# Sequences, tokens, experts a token, experts, rows and columns of a weight.
SHAPES = {
    "a token": (1, 1, 2, 4, 40, 70),
    "as many as have programs of their own": (2, 4, 2, 4, 33, 300),
    "tiles": (2, 40, 2, 5, 150, 70),
    "one expert a token": (1, 90, 1, 3, 20, 100),
    "more experts than choices": (1, 10, 2, 40, 20, 64),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("apart", [False, True], ids=["a row a token", "a row a choice"])
@pytest.mark.parametrize("chosen", ["any", "all but one", "one"])
def test_products(device: torch.device, shape: tuple, apart: bool, chosen: str) -> None:
    batch, length, each, experts, rows, width = shape
    index = torch.randint(experts, (batch, length, each), device=device)
    if chosen == "one":
        index.fill_(experts - 1)
    elif chosen == "all but one":
        index[index == 1] = 0
    leading = (batch, length, each) if apart else (batch, length)
    x = torch.randint(-127, 128, (*leading, width), dtype=torch.int8, device=device)
    w = torch.randint(-127, 128, (experts, rows, width), dtype=torch.int8, device=device)
    x_scale = bf16_up(0.01 + torch.rand(*leading, 1, device=device))
    w_scale = bf16_up(0.01 + torch.rand(experts, rows, 1, device=device))
    given = (x, x_scale, w, w_scale, index)
    assert torch.equal(int8_expert_linear(*given), ops.int8_expert_linear(*given))


def test_scales_of_whole_tensors(device: torch.device) -> None:
    x = torch.randint(-127, 128, (1, FEW + 1, 64), dtype=torch.int8, device=device)
    w = torch.randint(-127, 128, (3, 24, 64), dtype=torch.int8, device=device)
    scale = torch.tensor(0.25, device=device)
    index = torch.randint(3, (1, FEW + 1, 2), device=device)
    given = (x, scale, w, scale, index)
    assert torch.equal(int8_expert_linear(*given), ops.int8_expert_linear(*given))
