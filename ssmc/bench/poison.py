"""New memory that shows what was never written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

SHARE = 0.25  # of the free memory of a GPU
LARGEST = 8 * 2**30


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within it new tensors are NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def poison_free_memory(device: torch.device) -> None:
    """Fill free memory of a GPU with NaN and give it back, so that who asks next finds that.

    Not `poisoned`, whose fills would become part of a CUDA graph that is recorded within it.
    """
    free, _ = torch.cuda.mem_get_info(device)
    torch.cuda.empty_cache()
    size = min(int(SHARE * free), LARGEST)
    torch.full((size,), 0xFF, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
