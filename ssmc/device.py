"""Which device to run on, and what is on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ssmc.core import Graph
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


def move(graph: Graph, device: torch.device) -> None:
    """Put the tensors of `graph` on `device`; graphs made from it earlier keep the old ones.

    Raises DeviceError where the memory of the device does not suffice.
    """
    with running_on(device):
        graph.module.to(device)
    graph.elsewhere = None


@contextlib.contextmanager
def running_on(device: torch.device) -> Iterator[None]:
    """Make `device` the current one, where kernels without tensors of their own are launched.

    Raises DeviceError where its memory runs out.
    """
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            yield
    except torch.OutOfMemoryError as error:
        tried = str(error).partition(". GPU ")[0]  # what follows are the allocator's statistics
        raise DeviceError(
            f"{device} is out of memory: {tried}",
            hint="use a smaller batch or shorter inputs; --device cpu has the memory of the host",
        ) from None
