"""Tells transformers of ssmc, without anybody importing ssmc.

torch calls `register` when it is imported (the entry point `torch.backends` of pyproject.toml;
TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns that off), which is before transformers knows its quantizers.
So this module imports nothing of either.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

AWAITED = "transformers.quantizers.auto"
QUANTIZER = "ssmc.integrations.quantizer"


def register() -> None:
    """Have the quantizer registered as soon as transformers has a list of them."""
    if AWAITED in sys.modules:
        importlib.import_module(QUANTIZER)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the module that is awaited, once, as others find it; and follows its execution."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        importlib.import_module(QUANTIZER)
