"""What a case is, what it moves, and the least time that takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from kernel_cases import operands
from torch import Tensor

from cpu_cases.rates import Rates

CPU = torch.device("cpu")
integers = partial(operands.integers, device=CPU)
scales = partial(operands.scales, device=CPU)
weight = partial(operands.weight, bits=8, device=CPU)


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    `run` is the kernel, `inputs` makes fresh random operands. What it computes at least: `products`
    of int8, `floats` multiplications or additions of float32 (one that does both counts once), and
    `exponentials`. `unread` are bytes of operands that a call does not look at. `sets` are as many
    calls, each with operands of its own, as follow one another: those of the layers of a model.
    """

    model: str
    kernel: str
    shape: str
    run: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]]
    products: int = 0
    floats: int = 0
    exponentials: int = 0
    unread: int = 0
    sets: int = 1

    def moved(self, args: Iterable[Any], results: Any) -> int:
        """Bytes of a call: each operand read once, each result written once."""
        return size(args) + size(results) - self.unread

    def floor(self, moved: int, rates: Rates) -> float:
        """Seconds of a call that moves so many bytes: those, or all operations, which share units.

        Bytes come from where a set as large as those of all calls lies.
        """
        operations = (
            self.products / rates.products
            + self.floats / rates.floats
            + self.exponentials / rates.exponentials
        )
        return max(moved / rates.bandwidth(moved * self.sets), operations)


def size(values: Any) -> int:
    """Bytes of all tensors."""
    if isinstance(values, Tensor):
        return values.numel() * values.element_size()
    return sum(map(size, values)) if isinstance(values, tuple | list) else 0
