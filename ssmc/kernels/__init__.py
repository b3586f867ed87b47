"""Triton kernels: one file an operator family, each beside the operators it stands for.

A kernel's wrapper has the signature of the `ssmc::` operator it runs, so that a backend maps one to
the other by name; the operator's own definition (in `ssmc.ops`) is its naive reference.
"""
