"""Kernels for processors, compiled by Numba: one file an operator family.

Each has the signature of its operator. Numba compiles a kernel when it is first launched and keeps
what it compiled on disk.
"""

from __future__ import annotations

from llvmlite import binding
from numba import config
from numba.core.codegen import get_host_cpu_features


def has_vnni() -> bool:
    """Whether this machine multiplies 64 pairs of bytes in one instruction."""
    return bool(binding.get_host_cpu_features().get("avx512vnni", False))


# LLVM makes loops of 256 bits where processors once slowed down at 512. Those that multiply bytes
# do not, or not by as much. It counts for what this process compiles with Numba from here on.
if config.CPU_FEATURES is None and has_vnni():
    config.CPU_FEATURES = get_host_cpu_features() + ",-prefer-256-bit"
