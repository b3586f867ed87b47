"""Is a kernel right? Its results on fresh random inputs against its operator's definition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernel_cases.case import Case
from ssmc.bench.poison import poisoned


@dataclass(frozen=True)
class Difference:
    """The worst of a call's results.

    `error` is the largest relative error ||a - b|| / ||b|| of the float results, `flips` the
    largest share of integers that differ, by at most one; `problem` says what is wrong, or nothing.
    """

    error: float = 0.0
    flips: float = 0.0
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.error:.0e}" + (f" f{self.flips:.0e}" if self.flips else "")


def twin(value: Any) -> Any:
    """A tensor with memory of its own: same values, and the same strides where it is a view."""
    if not isinstance(value, Tensor):
        return value
    empty = torch.empty(0, dtype=value.dtype, device=value.device)
    storage = value.untyped_storage().clone()
    return empty.set_(storage, value.storage_offset(), value.shape, value.stride())


def results(value: Any) -> list[Tensor]:
    """The tensors that a call returned."""
    return [value] if isinstance(value, Tensor) else [x for part in value for x in results(part)]


def reference(case: Case, inputs: Sequence[Any]) -> list[Tensor]:
    """What the case's operator returns; the inputs stay as they are."""
    return results(case.operator(*map(twin, inputs)))


def check(
    case: Case, inputs: Sequence[Any], expected: Sequence[Tensor], config: dict[str, Any]
) -> Difference:
    """Run the kernel once into poisoned memory and compare.

    Beside its results, every input must be as before, but for those that it returns (states).
    """
    given = tuple(map(twin, inputs))
    with poisoned():
        got = results(case.kernel(*given, **config))
    found = compare(case, got, expected)
    written = {x.untyped_storage().data_ptr() for x in got}
    for i, (before, after) in enumerate(zip(inputs, given, strict=True)):
        kept = isinstance(after, Tensor) and after.untyped_storage().data_ptr() not in written
        if kept and not torch.equal(before, after):
            return Difference(found.error, found.flips, f"input {i} was written over")
    return found


def compare(case: Case, got: Sequence[Tensor], expected: Sequence[Tensor]) -> Difference:
    """The worst difference of results, and whether it is more than the case allows."""
    if len(got) != len(expected):
        return Difference(problem=f"{len(got)} results, expected {len(expected)}")
    worst = Difference()
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            text = f"result {i}: {list(a.shape)} {a.dtype}, expected {list(b.shape)} {b.dtype}"
            return Difference(worst.error, worst.flips, text)
        error, flips = _distance(a, b)
        worst = Difference(max(worst.error, error), max(worst.flips, flips), worst.problem)
        # Negated, so that NaN is no agreement.
        if not (error <= case.error and flips <= case.flips):
            text = f"result {i}: error {error:.1e}, differing {flips:.1e}"
            return Difference(error, flips, text)
    return worst


def _distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """(relative error, 0) of floats; (0, share differing) of integers, infinite above one apart."""
    if b.numel() == 0:
        return 0.0, 0.0
    if b.is_floating_point():
        norm = b.double().norm()
        error = (a.double() - b.double()).norm()
        return (error / norm if norm > 0 else error).item(), 0.0
    apart = (a.int() - b.int()).abs()
    return 0.0, float("inf") if int(apart.max()) > 1 else (apart != 0).double().mean().item()
