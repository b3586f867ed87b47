"""What stands beside a call: its name as a person says it, and its tensors with their formats."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ssmc.inspection.moments import Call, Moment
from ssmc.quant.weights import stored_weight


@dataclass(frozen=True)
class Label:
    """`title` names the call, `details` what it gives, its options and its tensors."""

    title: str
    details: tuple[str, ...]


def label(call: Call, moment: Moment) -> Label:
    """The label of a call at a moment."""
    title = f"{call.operator} {call.role}".strip()
    weights = [tensor_text(name, moment) for name in call.tensors if not name.endswith("_scale")]
    details = [call.value, call.options, *weights]
    return Label(title, tuple(text for text in details if text))


def tensor_text(name: str, moment: Moment) -> str:
    """`in_proj.weight int8 1024x256, a scale a row`."""
    value = moment.tensors[name]
    stored = stored_weight(name)
    if stored is None:
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{_short(name)} {dtype} {_extents(value)}"
    weight, bits = stored
    scale = moment.tensors.get(f"{weight}_scale")
    shared = "" if scale is None else f", {_shared(scale, value, bits)}"
    return f"{_short(weight)} int{bits} {_extents(value, bits)}{shared}"


def _short(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _extents(value: Tensor, bits: int = 8) -> str:
    """A shape; of packed integers with the columns that they are."""
    shape = list(value.shape)
    if bits < 8:
        shape[-1] = shape[-1] * 8 // bits
    return "x".join(map(str, shape)) or "1"


def _shared(scale: Tensor, value: Tensor, bits: int) -> str:
    if scale.numel() == 1:
        return "a scale a tensor"
    if scale.shape[-1] == 1:
        return "a scale a row"
    return f"a scale {value.shape[-1] * 8 // bits // scale.shape[-1]} columns"
