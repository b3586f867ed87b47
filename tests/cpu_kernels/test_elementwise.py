"""What is done to each number, beside torch."""

from __future__ import annotations

import torch

from ssmc.kernels.cpu.elementwise import add, argmax, copy_into, to_dtype
from ssmc.kernels.cpu.launch import Tape

ODD = torch.tensor(
    [0.0, -0.0, 1.0, -1.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, -3.4e38, torch.inf, -torch.inf,
     torch.nan, 2**-133, 1e-45, -1e-40]
)  # fmt: skip


def test_types() -> None:
    for x in (ODD, torch.randn(3, 1000), torch.randn(40, 7).T):
        narrow = to_dtype(x, torch.bfloat16)

        assert torch.allclose(narrow, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
        wide = to_dtype(narrow, torch.float32)
        assert wide.dtype == torch.float32
        assert torch.allclose(wide, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
    signs = to_dtype(ODD[:2], torch.bfloat16).view(torch.int16).tolist()
    assert signs == [0, -(2**15)]
    assert to_dtype(ODD, torch.float64).dtype == torch.float64
    assert to_dtype(ODD, torch.float32) is ODD


def test_counts_on_a_tape() -> None:
    position = torch.tensor([3, 5])
    with Tape() as tape:
        found = add(position, 4)
    assert found.tolist() == [7, 9]
    position += 10
    tape.run()
    assert found.tolist() == [17, 19]
    assert tape.plain == []
    assert torch.equal(add(torch.ones(2), torch.ones(2)), torch.full((2,), 2.0))
    assert add(2, 3) == 5


def test_copies() -> None:
    x, out = torch.randn(7, 1001), torch.zeros(7, 1001)
    copy_into(out, x)
    assert torch.equal(out, x)
    turned = torch.zeros(1001, 7).T
    copy_into(turned, x)
    assert torch.equal(turned, x)


def test_the_first_of_the_largest() -> None:
    x = torch.randn(5, 5003)
    x[1, 7] = x[1, 5000] = 100.0
    assert torch.equal(argmax(x), x.argmax(-1))
    assert argmax(x)[1] == 7
