"""ssmc: a compiler that makes state-space language models small and fast after training.

import ssmc
model = ssmc.compile("demo", passes="hadamard,percentile")
model.save("out")
ssmc.load("out").generate(ids)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssmc import ops
    from ssmc.compiler import compile
    from ssmc.core import Context, Graph, Match, Pass, op, register
    from ssmc.core.dialect import allow_operators
    from ssmc.frontend import load_model, register_adapter, trace
    from ssmc.runtime import CompiledModel, load

_HOMES = {
    "allow_operators": "ssmc.core.dialect",
    "compile": "ssmc.compiler",
    "load": "ssmc.runtime",
    "CompiledModel": "ssmc.runtime",
    "load_model": "ssmc.frontend",
    "register_adapter": "ssmc.frontend",
    "trace": "ssmc.frontend",
    **dict.fromkeys(("Context", "Graph", "Match", "Pass", "op", "register"), "ssmc.core"),
}

__version__ = "0.1.0"
__all__ = [
    "CompiledModel",
    "Context",
    "Graph",
    "Match",
    "Pass",
    "allow_operators",
    "compile",
    "load",
    "load_model",
    "op",
    "ops",
    "register",
    "register_adapter",
    "trace",
]


def __getattr__(name: str) -> Any:  # torch takes seconds to import: only when something needs it
    if name == "ops":
        return importlib.import_module("ssmc.ops")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ssmc' has no attribute '{name}'")
