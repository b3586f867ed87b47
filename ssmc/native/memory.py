"""Memory by address: a file of tensors, mapped, and room for values."""

from __future__ import annotations

import ctypes
import json
import mmap
from pathlib import Path

from ssmc.errors import ArtefactError

PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def damaged(path: Path, what: str) -> ArtefactError:
    """The error of a file that cannot be read."""
    return ArtefactError(f"{path} {what}", hint="export the artefact again, or copy it again")


class TensorFile:
    """A file of safetensors: its pages are read when a tensor is, and shared between processes.

    Raises ArtefactError for a file that is missing, truncated, or no such file.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self._pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise damaged(path, f"cannot be read: {error.strerror}") from None
        except ValueError:  # there is nothing to map
            raise damaged(path, "is empty") from None
        start = 8 + int.from_bytes(self._pages[:8], "little")
        try:
            header = json.loads(self._pages[8:start])
            self.places = {
                str(name): (start + entry["data_offsets"][0], start + entry["data_offsets"][1])
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, TypeError, KeyError, AttributeError):
            raise damaged(path, "is no safetensors file") from None
        if max((end for _, end in self.places.values()), default=start) != len(self._pages):
            raise damaged(path, "is truncated")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))

    def address(self, name: str) -> int:
        """Where a tensor is."""
        return self._address + self.places[name][0]

    def data(self, name: str) -> bytes:
        """The bytes of a tensor."""
        start, end = self.places[name]
        return self._pages[start:end]


class Room:
    """Bytes, zero at first, which take memory when they are written."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._pages = mmap.mmap(-1, max(1, size), flags=PRIVATE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))

    def clear(self) -> None:
        """Make all bytes zero."""
        ctypes.memset(self.address, 0, self.size)
