"""Patterns: the shape of a piece of graph, written as the calls it consists of.

    op.linear(op.rms_norm("x", "gamma"), "weight")

A string captures what stands there, a nested pattern matches the call that produces it (and
captures it under its `label`), None, numbers and truth values match themselves, and operands left
out match anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ssmc.core import dialect
from ssmc.core.graph import is_call


@dataclass(frozen=True)
class Pattern:
    """A call of operator `name` with these operands; optionally of one role, or used once.

    `label` is the name under which the call itself is captured.
    """

    name: str
    args: tuple[Any, ...] = ()
    role: str | None = None
    sole_user: bool = False
    label: str | None = None

    def match(self, node: Any) -> Match | None:
        """The captures where `node` has this shape, else None."""
        captures: dict[str, Any] = {}
        return Match(node, captures) if self._match(node, captures) else None

    def _match(self, node: Any, captures: dict[str, Any]) -> bool:
        if not is_call(node, self.name):
            return False
        if self.role is not None and node.meta.get("role") != self.role:
            return False
        if self.sole_user and len(node.users) != 1:
            return False
        if self.label is not None and captures.setdefault(self.label, node) is not node:
            return False
        values = dialect.operands(node).values()
        pairs = zip(self.args, values, strict=False)
        return len(self.args) <= len(values) and all(_operand(p, v, captures) for p, v in pairs)


def _operand(pattern: Any, value: Any, captures: dict[str, Any]) -> bool:
    if isinstance(pattern, Pattern):
        return pattern._match(value, captures)
    if isinstance(pattern, str):
        return captures.setdefault(pattern, value) is value
    return type(value) is type(pattern) and bool(value == pattern)


@dataclass(frozen=True)
class Match:
    """A place where a pattern holds: `node` is its last call; captures are attributes."""

    node: fx.Node
    captures: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.captures[name]
        except KeyError:
            raise AttributeError(f"the pattern captures no '{name}'") from None


class _Operators:
    def __getattr__(self, name: str) -> Callable[..., Pattern]:
        full = name if name in dialect.FUNCTIONS else f"ssmc::{name}"

        def build(
            *args: Any,
            role: str | None = None,
            sole_user: bool = False,
            label: str | None = None,
        ) -> Pattern:
            return Pattern(full, args, role, sole_user, label)

        return build


op = _Operators()
