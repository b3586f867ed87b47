"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Backend:
    """A name and, for the operators it has kernels of its own for, those kernels.

    What is not listed runs the operator's reference. `tolerance` is the relative error
    `ssmc verify` allows a float result of its kernels (0: the same bits); integers must be equal.
    """

    name: str
    kernels: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    tolerance: float = 0.0
