"""Backends: which function runs each fused operator. One file a backend."""

from __future__ import annotations

from ssmc.lowering.backends.backend import Backend, Tolerance
from ssmc.lowering.backends.cpu import CPU
from ssmc.lowering.backends.reference import REFERENCE
from ssmc.lowering.backends.triton import TRITON

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (REFERENCE, CPU, TRITON)}

__all__ = ["BACKENDS", "Backend", "Tolerance"]
