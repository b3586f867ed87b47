"""Does a text contain what a model was calibrated on?

Both are taken as their runs of RUN tokens. Of the runs' hashes a text keeps those that are zero
modulo KEPT: a run is kept by what it is, not by where, so the same ones are kept of both (Broder
1997, 'On the resemblance and containment of documents', sketches modulo m).
"""

from __future__ import annotations

import base64

import numpy as np
import torch
from numpy.typing import NDArray

RUN = 20
"""Tokens: about a sentence, which two texts do not have in common by chance."""
KEPT = 16

Hashes = NDArray[np.uint64]

_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def run_hashes(windows: torch.Tensor) -> Hashes:
    """The hashes kept of token windows [n, length], sorted, each once."""
    ids = windows.cpu().numpy().astype(np.uint64)
    count = max(0, ids.shape[1] - RUN + 1)
    hashes = np.zeros((len(ids), count), dtype=np.uint64)
    for i in range(RUN):
        hashes = _mixed(hashes + ids[:, i : i + count] + np.uint64(1))
    return np.unique(hashes[hashes % KEPT == 0])


def _mixed(x: Hashes) -> Hashes:
    """Every bit of 64 spread over all others (multiply and shift, wrapping around)."""
    x = (x ^ (x >> np.uint64(32))) * _FACTOR
    return x ^ (x >> np.uint64(29))


def shared(hashes: Hashes, known: Hashes) -> float | None:
    """The share of `hashes` that are among `known`; None where there are none to compare."""
    return float(np.isin(hashes, known).mean()) if len(hashes) and len(known) else None


def to_text(hashes: Hashes) -> str:
    """Hashes as base64 of their 8 bytes each, the lowest first."""
    return base64.b64encode(hashes.astype("<u8").tobytes()).decode()


def from_text(text: str) -> Hashes:
    """The inverse of `to_text`; ValueError where it is none."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<u8").astype(np.uint64)
