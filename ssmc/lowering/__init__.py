"""Lowering: the quantised graph becomes calls of fused integer kernels of a backend."""

from ssmc.lowering.backends import BACKENDS, Backend
from ssmc.lowering.lower import Lowered, lower

__all__ = ["BACKENDS", "Backend", "Lowered", "lower"]
