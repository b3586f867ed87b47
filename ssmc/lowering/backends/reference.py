"""The `reference` backend: every fused operator as its plain torch definition. The oracle."""

from __future__ import annotations

from ssmc.lowering.backends.backend import Backend

REFERENCE = Backend("reference")
