"""What layers of all kinds have: products, norms, rotations, convolutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cpu_cases.case import Case, integers, scales, weight
from ssmc.kernels.cpu.conv1d import int8_causal_conv1d_quantize, int8_causal_conv1d_split
from ssmc.kernels.cpu.linear import (
    int8_linear,
    int8_linear_add,
    int8_linear_quantize,
    int8_linear_split,
)
from ssmc.kernels.cpu.norm import add_rms_norm_quantize, hadamard_quantize
from ssmc.quant.rotation import base_factor, largest_block

TAPS = 4
NORMALISE, QUANTISE = 3, 1  # a value's square, its factor and its weight; its inverse scale


@dataclass(frozen=True)
class Call:
    """One sequence of a model: `length` tokens, in as many layers as differ in their operands."""

    model: str
    length: int
    sets: int = 1

    def case(
        self, kernel: str, shape: str, run: Any, inputs: Callable[[], tuple[Any, ...]], **work: int
    ) -> Case:
        """A case whose shape begins with the length."""
        return Case(self.model, kernel, f"{self.length} × {shape}", run, inputs,
                    sets=self.sets, **work)  # fmt: skip


def product(call: Call, name: str, n: int, k: int, run: Any = int8_linear, *rest: Any) -> Case:
    """x [length, k] times a weight [n, k], and what `run` makes of it with `rest`."""

    def inputs() -> tuple[Any, ...]:
        x = integers(1, call.length, k), scales(1, call.length, 1)
        return *x, *weight(n, k), None, *(_made(r) for r in rest)

    return call.case(name, f"{n} × {k}", run, inputs, products=call.length * n * k)


def _made(operand: Any) -> Any:
    return operand() if callable(operand) else operand


def in_proj(call: Call, n: int, k: int) -> Case:
    """Rounded with static scales."""
    return product(call, "in_proj, rounded", n, k, int8_linear_quantize, lambda: scales(n))


def out_proj(call: Call, n: int, k: int) -> Case:
    """Added to the residual."""
    residual = lambda: torch.randn(1, call.length, n)  # noqa: E731
    return product(call, "out_proj, added", n, k, int8_linear_add, residual)


def split(call: Call, name: str, sizes: list[int], k: int) -> Case:
    """Segments with scales of their own."""
    return product(call, name, sum(sizes), k, int8_linear_split, sizes)


def norm(call: Call, width: int) -> Case:
    """Of the sum of the residual stream and what a layer adds."""

    def inputs() -> tuple[Any, ...]:
        return *torch.randn(2, 1, call.length, width), torch.rand(width)

    floats = call.length * width * (1 + NORMALISE + QUANTISE)
    return call.case("add, norm, quantise", f"{width}", add_rms_norm_quantize, inputs,
                     floats=floats)  # fmt: skip


def rotation(call: Call, width: int) -> Case:
    """As wide as it can be."""
    block = largest_block(width)

    def inputs() -> tuple[Any, ...]:
        return torch.randn(1, call.length, width), block

    floats = call.length * (rotating(width, block) + QUANTISE * width)
    return call.case("rotate, quantise", f"{width}", hadamard_quantize, inputs, floats=floats)


def rotating(width: int, block: int) -> int:
    """Additions of a fast transform of a row, and its factor."""
    base, _ = base_factor(block)
    doublings = (block // base).bit_length() - 1
    return width * (doublings + (base if base > 1 else 0) + 1)


def conv(call: Call, wide: int, channels: int, rounded: int) -> Case:
    """SiLU of it, rounded, of `channels` out of `wide`; others than `rounded` with own scales."""

    def inputs() -> tuple[Any, ...]:
        x = integers(1, call.length, wide)[..., wide - channels :]
        taps, state = (integers(channels, TAPS), scales(channels)), integers(1, TAPS - 1, channels)
        return x, scales(channels), *taps, torch.randn(channels), state, "silu"

    count = call.length * channels
    work = {"products": TAPS * count, "floats": QUANTISE * count, "exponentials": count}
    name, shape = "convolution, SiLU, quantise", f"{channels} × {TAPS}"
    if rounded == channels:
        return call.case(name, shape, int8_causal_conv1d_quantize,
                         lambda: (*inputs(), scales(channels)), **work)  # fmt: skip
    return call.case(name, shape, int8_causal_conv1d_split,
                     lambda: (*inputs(), scales(rounded // 64, 64), 1), **work)  # fmt: skip
