"""Where a pass stands, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Saved:
    """JSON data and tensors by name."""

    about: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous host tensors, none of which shares memory with another: what can be written."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        whole = value.untyped_storage().nbytes() == value.nbytes
        if not whole or value.data_ptr() in seen:
            value = value.clone()
        seen.add(value.data_ptr())
        found[name] = value
    return found
