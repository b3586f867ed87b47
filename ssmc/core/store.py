"""Tensors in mapped files, so that a model may be larger than the memory it is compiled in."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import tempfile
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ssmc.errors import UsageError

SMALL = 2**18
"""Bytes below which a tensor stays where it is: each file takes pages and a handle."""
TARGET = 0.6
"""The share of the limit above which pages are given back: what comes next must fit beside."""
POLL = 0.02
"""Seconds between two looks at how much is in memory."""
_LIBC = ctypes.CDLL(None)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_size(text: str) -> int:
    """Bytes: `6GB`, `500 MiB`, `6000000000`; UsageError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text.strip().lower())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if not size:
        raise UsageError(f"'{text}' is no size", hint="for instance 6GB or 500MiB")
    return size


class Store:
    """Keeps tensors in unnamed files of `folder`, and this process below `limit` bytes.

    The files have no names, so that the system removes them with the process, however it ends.
    Their pages count as memory of the process while they are in use; those of all files are given
    back when it comes near the limit, and read again (from the file, or what the system has of it
    in otherwise unused memory) where they are needed. Raises UsageError where the system has no
    such mappings.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        if not hasattr(mmap.mmap, "madvise") or not Path("/proc/self/statm").is_file():
            raise UsageError("a limit of memory needs Linux", hint="leave --max-memory out here")
        self.folder, self.limit = folder, limit
        self._mapped: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
        self._lent: list[Tensor] = []
        watch = threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True)
        watch.start()

    def keep(self, value: Tensor) -> Tensor:
        """The same tensor in host memory that can be given back; small ones as they are.

        Raises UsageError where the process needs more than the limit beside such tensors.
        """
        value = value.detach()
        if value.nbytes < SMALL:
            return value.cpu()
        if (needed := _resident("RssAnon")) > self.limit:
            raise UsageError(
                f"{needed / 1e9:.1f} GB are in use beside the weights, and only "
                f"{self.limit / 1e9:.1f} GB are allowed",
                hint="raise --max-memory, or lower --samples and --length",
            )
        self.trim()  # at once, and not only when the watching thread has its turn
        kept = self._room(value.nbytes).view(value.dtype).view(value.shape)
        return kept.copy_(value)

    def _room(self, size: int) -> Tensor:
        """A byte tensor over a new file."""
        with tempfile.TemporaryFile(dir=self.folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error now, not a signal
            pages = mmap.mmap(file.fileno(), size)
        self._mapped.add(pages)
        return torch.frombuffer(pages, dtype=torch.uint8)

    def lend(self, tensors: Iterable[Tensor]) -> None:
        """Give back pages of these, too, until the next call: tensors of a file, never written."""
        self._lent = list(tensors)

    def trim(self) -> None:
        """Give pages back where the process comes near the limit."""
        if _resident("VmRSS") < TARGET * self.limit:
            return
        for pages in list(self._mapped):
            pages.madvise(mmap.MADV_DONTNEED)
        for tensor in list(self._lent):
            _give_back(tensor)
        if hasattr(
            _LIBC, "malloc_trim"
        ):  # glibc keeps what was freed, a layer's values by the next
            _LIBC.malloc_trim(ctypes.c_size_t(0))


def _watch(reference: weakref.ref[Store]) -> None:
    done = threading.Event()
    while (store := reference()) is not None:
        store.trim()
        del store
        done.wait(POLL)


def _give_back(tensor: Tensor) -> None:
    """Drop the whole pages that a tensor of a mapped file lies in."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _resident(kind: str) -> int:
    """Memory of this process in bytes: all (`VmRSS`), or what is in no file (`RssAnon`)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{kind}:")[2].split(None, 1)[0]) * 1024
