"""The registry of adapters: which modules are traced by something else than their own forward."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ssmc.core.state import POSITION, States
from ssmc.errors import UnsupportedError
from ssmc.frontend import attention, experts, layers, mixers

Matches = Callable[[nn.Module], bool]


@dataclass(frozen=True)
class Adapter:
    """Traces the modules that `matches` picks by `forward` in place of their own."""

    matches: Matches
    forward: Callable[..., Any]
    states: Callable[[nn.Module], mixers.Shapes] | None = None


MIXERS = (
    Adapter(mixers.is_mamba1, mixers.mamba1, mixers.mamba1_states),
    Adapter(mixers.is_mamba2, mixers.mamba2, mixers.mamba2_states),
    Adapter(attention.is_attention, attention.attention, attention.attention_states),
    Adapter(
        attention.is_unturned_attention, attention.unturned_attention, attention.attention_states
    ),
)
LAYERS = (
    Adapter(layers.is_linear, layers.linear),
    Adapter(layers.is_embedding, layers.embedding),
    Adapter(layers.is_rms_norm, layers.rms_norm),
    Adapter(layers.is_gated_rms_norm, layers.gated_rms_norm),
    Adapter(layers.is_weightless_rms_norm, layers.weightless_rms_norm),
    Adapter(attention.is_rotary, attention.rotary),
    Adapter(experts.is_mixture, experts.mixture),
    Adapter(experts.is_even_mixture, experts.even_mixture),
    Adapter(experts.is_shared_mixture, experts.shared_mixture),
)
_registered: list[Adapter] = []


def register_adapter(
    matches: Matches,
    forward: Callable[..., Any],
    states: Callable[[nn.Module], mixers.Shapes] | None = None,
) -> Callable[[], None]:
    """Trace every module for which `matches(module)` holds by `forward(module, *args, **kwargs)`.

    `forward` calls `ssmc.ops`, the dialect's torch functions and the module's own sub-modules.
    A recurrent module names its states by `states(module)`: kind to shape without the batch,
    for instance `{"ssm": (512, 16)}`. `forward(module, state, *args, **kwargs)` is then handed
    their tensors as a dict and replaces each entry by the state after the call. A shape that
    starts with -1 is a cache with a row for each token, which there is room for; the state
    `position` [], how many tokens each sequence has had, is shared by all who name it, and counted
    for them.

    The adapter registered last is asked first, the built-in ones after all others. Returns a
    function that takes the registration back.
    """
    adapter = Adapter(matches, forward, states)
    _registered.insert(0, adapter)
    return functools.partial(_registered.remove, adapter)


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter that traces `module`, or None where its own forward does."""
    adapters = (*_registered, *MIXERS, *LAYERS)
    return next((a for a in adapters if a.matches(module)), None)


@dataclass(frozen=True)
class Site:
    """One module and its adapter; `states` maps a state's kind to its name in the graph."""

    path: str
    module: nn.Module
    adapter: Adapter
    states: dict[str, str]

    def bind(self, states: States, new: States) -> Callable[..., Any]:
        """The forward of this site: takes its states from `states`, puts them into `new`."""
        if not self.states:
            return functools.partial(self.adapter.forward, self.module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not new.keys().isdisjoint(self.states.values()):
                raise UnsupportedError(
                    f"module '{self.path}' keeps a state and is called more than once"
                )
            own = {kind: states[name] for kind, name in self.states.items()}
            result = self.adapter.forward(self.module, own, *args, **kwargs)
            new.update((self.states[kind], own[kind]) for kind in own if kind != POSITION)
            return result

        return forward


@contextlib.contextmanager
def installed(sites: list[Site], states: States) -> Iterator[States]:
    """Within the context the sites' modules run by their adapters; yields the new states."""
    new: States = {}
    with contextlib.ExitStack() as stack:
        for site in sites:
            stack.enter_context(_forward_replaced(site.module, site.bind(states, new)))
        yield new


@contextlib.contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before
