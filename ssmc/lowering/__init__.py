"""Lowering: the quantised graph becomes calls of fused integer kernels of a backend."""

from ssmc.lowering.backends import BACKENDS, Backend, Tolerance
from ssmc.lowering.lower import Form, Lowered, lower

__all__ = ["BACKENDS", "Backend", "Form", "Lowered", "Tolerance", "lower"]
