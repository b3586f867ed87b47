"""Which device to run on."""

from __future__ import annotations

import torch

from ssmc.errors import DeviceError, UsageError, choices

NAMES = ("auto", "cpu", "cuda")


def find_device(name: str) -> torch.device:
    """The device called `name`: `cpu`, `cuda`, `cuda:1`, or `auto` (CUDA where there is one).

    Raises UsageError for an unknown name, DeviceError where the device is missing.
    """
    kind, _, index = name.partition(":")
    if kind not in NAMES or (index and not index.isdigit()):
        raise UsageError(f"unknown device '{name}'", hint=choices(name, NAMES))
    if kind == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"there is no device {name}", hint="--device cpu runs everywhere")
    return torch.device(name)
