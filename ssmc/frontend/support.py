"""Whether a language model is made of layers that can be traced."""

from __future__ import annotations

import inspect

from torch import nn

from ssmc.errors import UnsupportedError
from ssmc.frontend.adapters import adapter_of
from ssmc.frontend.attention import ATTENTION
from ssmc.frontend.mixers import CACHE_ARGUMENTS, MAMBA1, MAMBA2

_WANTED = (
    f"a Mamba-1 mixer ({', '.join(MAMBA1)}), a Mamba-2 mixer ({', '.join(MAMBA2)}) or causal "
    f"attention ({', '.join(ATTENTION)}) whose computation is known"
)


def check_supported(module: nn.Module) -> None:
    """Raise UnsupportedError, naming what was looked for and found, unless all mixers are known.

    Mixers are the modules whose adapter keeps states. What takes a cache is one, or made of such; a
    layer of which nothing does may have none, where others have.
    """
    mixers = [path for path, child in module.named_modules() if _keeps_states(child)]
    for path, layer in _layers(module):
        unknown = any(
            _takes_cache(child) and not _has(mixers, f"{path}.{name}")
            for name, child in layer.named_modules()
            if name
        )
        if unknown or not mixers:
            found = ", ".join(name for name, _ in layer.named_children())
            raise UnsupportedError(
                f"{type(module).__name__} is not supported: looked in each layer for {_WANTED}; "
                f"found in '{path}' a {type(layer).__name__} of {found}",
                hint="ssmc.frontend.register_adapter adds the mixer of another architecture",
            )


def _has(mixers: list[str], path: str) -> bool:
    """Whether a mixer is at `path`, below or above it."""
    return any(f"{m}.".startswith(f"{path}.") or f"{path}.".startswith(f"{m}.") for m in mixers)


def _takes_cache(module: nn.Module) -> bool:
    return not CACHE_ARGUMENTS.isdisjoint(inspect.signature(module.forward).parameters)


def _keeps_states(module: nn.Module) -> bool:
    adapter = adapter_of(module)
    return adapter is not None and adapter.states is not None


def _layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The items of the outermost lists of modules, by path; the module itself without any."""
    lists = {path: m for path, m in module.named_modules() if isinstance(m, nn.ModuleList)}
    outer = [p for p in lists if not any(p.startswith(f"{other}.") for other in lists)]
    items = [(f"{path}.{i}", item) for path in outer for i, item in enumerate(lists[path])]
    return items or [(type(module).__name__, module)]
