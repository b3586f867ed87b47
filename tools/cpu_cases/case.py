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
class Moved:
    """Bytes read and written by a call, and the memory of all calls that they lie in."""

    bytes: int
    among: int


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

    def moved(self, args: Iterable[Any], results: Any) -> Moved:
        """What a call moves: each operand read once, each result written once."""
        tensors = [*_tensors(args), *_tensors(results)]
        distinct = {tensor.data_ptr(): _bytes(tensor) for tensor in tensors}
        count = sum(map(_bytes, tensors)) - self.unread
        return Moved(count, min(count, sum(distinct.values())) * self.sets)

    def floor(self, moved: Moved, rates: Rates) -> float:
        """Seconds of a call: of what it moves, or of all operations, which share units."""
        operations = (
            self.products / rates.products
            + self.floats / rates.floats
            + self.exponentials / rates.exponentials
        )
        return max(moved.bytes / rates.bandwidth(moved.among), operations)


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [t for v in values for t in _tensors(v)] if isinstance(values, tuple | list) else []


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
