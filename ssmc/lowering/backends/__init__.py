"""Backends: which function runs each fused operator. One file a backend."""

from __future__ import annotations

from ssmc.lowering.backends.backend import Backend
from ssmc.lowering.backends.cpu import CPU
from ssmc.lowering.backends.reference import REFERENCE

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (REFERENCE, CPU)}

__all__ = ["BACKENDS", "Backend"]
