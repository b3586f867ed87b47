"""Tells transformers and lm-eval of ssmc, without anybody importing ssmc.

torch calls `register` when it is imported (the entry point `torch.backends` of pyproject.toml;
TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns that off), which is before either has its list of quantizers
or of models. So this module imports nothing of them.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def _add_quantizer() -> None:
    importlib.import_module("ssmc.integrations.quantizer")


def _add_model() -> None:
    """By name alone: it is imported when it is asked for."""
    registry = importlib.import_module("lm_eval.api.registry").model_registry
    if "ssmc" not in registry:
        registry.register("ssmc", target="ssmc.integrations.lm_eval:TargetModel")


FOLLOWED = {"transformers.quantizers.auto": _add_quantizer, "lm_eval.models": _add_model}
"""Modules that hold the lists, and what is done when one has been imported."""


def register() -> None:
    """Have ssmc added to each list as soon as there is one."""
    for name, add in FOLLOWED.items():
        if name in sys.modules:
            add()
        elif not any(isinstance(f, _Finder) and f.name == name for f in sys.meta_path):
            sys.meta_path.insert(0, _Finder(name, add))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module, once, as others find it; and follows its execution."""

    def __init__(self, name: str, add: Callable[[], None]) -> None:
        self.name, self.add = name, add

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.add)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader, add: Callable[[], None]) -> None:
        self.inner, self.add = inner, add

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        self.add()
