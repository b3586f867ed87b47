"""Kernels for processors, compiled by Numba: one file an operator family.

Each has the signature of its operator. Numba compiles a kernel when it is first launched and keeps
what it compiled on disk.
"""
