"""What a pass changed: nodes, and parameters by value.

Rotations and foldings change weights and leave the nodes alone, so a diff of nodes would call
them nothing; parameters are compared by their statistics and their hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ssmc.core.graph import Graph
from ssmc.core.text import graph_lines

PIECE = 2**19
"""Values of a tensor that are looked at at a time: copies in float64 stay in the cache."""
ROW = 2**10
"""Values that are summed in one order, however many threads there are."""
GROUP = 2**30
"""Bytes of tensors that are read twice while they are in memory, by hash and by value."""


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
    stats = [_stats([side.params.get(name) for name in changed]) for side in (before, after)]
    return Diff(
        removed=[line for line in before.lines.values() if line not in new],
        added=[line for line in after.lines.values() if line not in old],
        params=dict(zip(changed, zip(*stats, strict=True), strict=True)),
        nodes_before=len(before.lines),
        nodes_after=len(after.lines),
    )


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Statistics of tensors that are there still: what one pass has left the next one changes."""


def _stats(values: Sequence[torch.Tensor | None]) -> list[ParamStats | None]:
    """The statistics of each tensor, None for None.

    Hashing leaves the interpreter free, so threads share the tensors. Arithmetic has threads of
    its own, and comes when they have ended.
    """
    new = [value for value in values if value is not None and value not in _known]
    with ThreadPoolExecutor() as pool:
        for group in _groups(new):
            for value, digest in zip(group, list(pool.map(_hash, group)), strict=True):
                _known[value] = _described(value, digest)
    return [None if value is None else _known[value] for value in values]


def _groups(values: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours that have GROUP bytes together, or little more."""
    group: list[torch.Tensor] = []
    for value in values:
        group.append(value)
        if sum(x.nbytes for x in group) >= GROUP:
            yield group
            group = []
    yield group


def param_stats(value: torch.Tensor) -> ParamStats:
    """Statistics and hash of a tensor; those of a tensor on the meta device are NaN."""
    return _described(value, _hash(value))


def _described(value: torch.Tensor, digest: str) -> ParamStats:
    shape, dtype = list(value.shape), str(value.dtype).removeprefix("torch.")
    if value.device.type == "meta":
        return ParamStats(dtype, shape, float("nan"), float("nan"), digest)
    pieces = value.detach().flatten().split(PIECE)
    count = max(value.numel(), 1)
    mean = sum(_sum(x.double()) for x in pieces) / count
    second = fourth = 0.0
    for x in pieces:
        spread = x.double().sub_(mean).square_()
        second += _sum(spread) / count
        fourth += _sum(spread.square_()) / count
    largest = max((abs(float(end)) for x in pieces if len(x) for end in x.aminmax()), default=0.0)
    kurtosis = fourth / second**2 if second > 0 else 0.0
    return ParamStats(dtype, shape, largest, kurtosis, digest)


def _sum(x: torch.Tensor) -> float:
    rows = x[: len(x) // ROW * ROW].view(-1, ROW)
    return (rows.sum(1).sum() + x[rows.numel() :].sum()).item()


def _hash(value: torch.Tensor) -> str:
    return "" if value.device.type == "meta" else tensor_hash(value)


def tensor_hash(value: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw.data).hexdigest()
