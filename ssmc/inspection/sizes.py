"""What the tensors of a graph take: bytes and bits, one by one and by what they belong to."""

from __future__ import annotations

from dataclasses import dataclass

from ssmc.inspection.moments import Moment
from ssmc.quant.weights import stored_weight


@dataclass(frozen=True)
class Size:
    """A tensor: `bits` of each value, `values` that it stands for, `bytes` that it takes."""

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    bits: int
    values: int
    bytes: int


@dataclass(frozen=True)
class RoleSize:
    """Tensors of a role together; `bits` is the mean over their values."""

    role: str
    tensors: int
    bytes: int
    bits: float


def sizes(moment: Moment) -> list[Size]:
    """Every tensor, in order of use."""
    roles = _roles(moment)
    found = []
    for name, value in moment.tensors.items():
        stored = stored_weight(name)
        bits = stored[1] if stored else value.element_size() * 8
        values = value.nbytes * 8 // bits
        dtype = str(value.dtype).removeprefix("torch.")
        role = roles.get(name, "other")
        found.append(Size(name, role, dtype, tuple(value.shape), bits, values, value.nbytes))
    return found


def by_role(moment: Moment) -> list[RoleSize]:
    """Sums over the roles, the largest first."""
    groups: dict[str, list[Size]] = {}
    for size in sizes(moment):
        groups.setdefault(size.role, []).append(size)
    rows = [
        RoleSize(
            role,
            len(found),
            sum(s.bytes for s in found),
            8 * sum(s.bytes for s in found) / sum(s.values for s in found),
        )
        for role, found in groups.items()
    ]
    return sorted(rows, key=lambda row: -row.bytes)


def _roles(moment: Moment) -> dict[str, str]:
    """What each tensor belongs to: the role of the first call that reads it."""
    found: dict[str, str] = {}
    for call in moment.calls.values():
        for name in call.tensors:
            found.setdefault(name, call.role or call.operator)
    return found
