"""What each pass did, as data: one record a pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ssmc.core.diff import Diff


@dataclass
class Record:
    """One pass's record.

    `error` is the relative error of the probe's result against the result before the pass
    (None for an analysis), `limit` what the pass may add (None: not limited). `notes` is what
    the pass itself had to say.
    """

    name: str
    stage: str
    options: dict[str, Any]
    matched: list[str] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    diff: Diff = field(default_factory=Diff)
    error: float | None = None
    limit: float | None = None
    seconds: float = 0.0

    def to_json(self, *, timing: bool = True) -> dict[str, Any]:
        """As plain data; without `timing`, the same inputs give the same record."""
        data = dict(vars(self)) | {"diff": self.diff.to_json()}
        if not timing:
            del data["seconds"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """The record that `to_json` gave, with its timing."""
        return cls(**{**data, "diff": Diff.from_json(data["diff"])})


@dataclass
class Report:
    """The records of a compilation, in order."""

    records: list[Record] = field(default_factory=list)

    def to_json(self, *, timing: bool = True) -> list[dict[str, Any]]:
        """As plain data."""
        return [record.to_json(timing=timing) for record in self.records]
