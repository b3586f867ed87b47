"""Functions that Numba compiles to code without Python, called by address."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from numba import cfunc, types
from numba.core.caching import FunctionCache


class Kernel:
    """A function of int64 words; compiled, or loaded from where it is kept, when it is needed.

    What is launched has three: the address of its arguments, and which share of the work to do,
    thread and threads.
    """

    def __init__(self, function: Callable[..., None], fastmath: set[str], words: int = 3) -> None:
        self.function, self.fastmath = function, fastmath
        self.signature = types.void(*[types.int64] * words)

    @cached_property
    def _compiled(self) -> Any:
        options = {"fastmath": self.fastmath, "error_model": "numpy"}
        return cfunc(self.signature, cache=True, **options)(self.function)

    @cached_property
    def address(self) -> int:
        """Where its code is."""
        return int(self._compiled.address)

    @property
    def call(self) -> Callable[..., None]:
        """The function itself, without Python's lock."""
        found: Callable[..., None] = self._compiled.ctypes
        return found

    @property
    def name(self) -> str:
        """Of the function, and of its module."""
        return f"{self.function.__module__.rpartition('.')[2]}.{self.function.__name__}"

    def code(self) -> tuple[str, bytes]:
        """The name of its symbol, and the object file in which it is.

        Numba hands an object file over when it links it; that of a kernel that it loaded is read
        from where Numba keeps it.
        """
        compiled = self._compiled
        if compiled.cache_hits:
            cache = FunctionCache(self.function)
            key = cache._index_key(self.signature, compiled._library.codegen)
            library, *_ = cache._cache_file.load(key)
        else:
            library = compiled._library.serialize_using_object_code()
        _, _, (code, _) = library
        return compiled.native_name, bytes(code)


def kernel(*fastmath: str) -> Callable[[Callable[..., None]], Kernel]:
    """A kernel whose floats may be treated as LLVM's `fastmath` flags say; it may always fuse.

    `reassoc` lets sums of floats be vectorised. Integers do not depend on it.
    """
    return lambda function: Kernel(function, {"contract", *fastmath})
