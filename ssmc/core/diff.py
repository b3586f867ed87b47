"""What a pass changed: nodes, and parameters by value.

Rotations and foldings change weights and leave the nodes alone, so a diff of nodes would call
them nothing; parameters are compared by their statistics and their hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ssmc.core.graph import Graph
from ssmc.core.text import graph_lines

PIECE = 2**16
"""How many values of a tensor are looked at at a time: copies in float64 stay in the cache."""


@dataclass(frozen=True)
class ParamStats:
    """A tensor at a glance. `kurtosis` is the fourth standardised moment (3 for a Gaussian)."""

    dtype: str
    shape: list[int]
    absmax: float
    kurtosis: float
    sha256: str


@dataclass
class Diff:
    """Lines of nodes that went and came, and (before, after) statistics of changed tensors."""

    removed: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    params: dict[str, tuple[ParamStats | None, ParamStats | None]] = field(default_factory=dict)
    nodes_before: int = 0
    nodes_after: int = 0

    def __bool__(self) -> bool:
        """Whether anything is different."""
        return bool(self.removed or self.added or self.params)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Diff:
        """The diff that `to_json` gave."""
        params = {
            name: tuple(stats and ParamStats(**stats) for stats in pair)
            for name, pair in data["params"].items()
        }
        return cls(**{**data, "params": params})


@dataclass(frozen=True)
class Snapshot:
    """A graph as it was: its lines, and its tensors (never changed in place, so not copied)."""

    lines: dict[str, str]
    params: dict[str, torch.Tensor]

    @classmethod
    def of(cls, g: Graph) -> Snapshot:
        """The present of `g`."""
        return cls(graph_lines(g), g.params())


def difference(before: Snapshot, after: Snapshot) -> Diff:
    """What is different between two moments of a graph."""
    old, new = set(before.lines.values()), set(after.lines.values())
    changed = [
        name
        for name in dict.fromkeys([*before.params, *after.params])
        if before.params.get(name) is not after.params.get(name)
    ]
    with ThreadPoolExecutor() as pool:  # hashing and arithmetic leave the interpreter free
        stats = [pool.map(_stats, map(side.params.get, changed)) for side in (before, after)]
    return Diff(
        removed=[line for line in before.lines.values() if line not in new],
        added=[line for line in after.lines.values() if line not in old],
        params=dict(zip(changed, zip(*stats, strict=True), strict=True)),
        nodes_before=len(before.lines),
        nodes_after=len(after.lines),
    )


def _stats(value: torch.Tensor | None) -> ParamStats | None:
    return None if value is None else param_stats(value)


def param_stats(value: torch.Tensor) -> ParamStats:
    """Statistics and hash of a tensor; those of a tensor on the meta device are NaN."""
    shape, dtype = list(value.shape), str(value.dtype).removeprefix("torch.")
    if value.device.type == "meta":
        return ParamStats(dtype, shape, float("nan"), float("nan"), "")
    pieces = value.detach().flatten().split(PIECE)
    count = max(value.numel(), 1)
    mean = sum(x.double().sum().item() for x in pieces) / count
    second = fourth = largest = 0.0
    for x in pieces:
        spread = (x.double() - mean).square()
        second += spread.sum().item() / count
        fourth += spread.square().sum().item() / count
        largest = max(largest, x.double().abs().max().item() if x.numel() else 0.0)
    kurtosis = fourth / second**2 if second > 0 else 0.0
    return ParamStats(dtype, shape, largest, kurtosis, tensor_hash(value))


def tensor_hash(value: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw.data).hexdigest()
