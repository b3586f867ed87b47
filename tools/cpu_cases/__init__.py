"""Kernels for CPUs at the sizes of models: what each has to do at least, timed by a tool."""
