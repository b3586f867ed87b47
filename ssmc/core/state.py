"""Recurrent states as plain tensors: what a graph takes in and gives back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

States = dict[str, Tensor]

POSITION = "position"
"""The state that counts the tokens a sequence has had, int64 [batch]."""
OPEN = -1
"""The first extent of a state that holds a row for each token: caches of keys and values."""


@dataclass(frozen=True)
class StateSpec:
    """One state: its name (`l3_conv`), its shape without the batch dimension, its dtype.

    Where the shape starts with OPEN, that extent is the number of tokens there is room for, which
    whoever makes the state chooses; `POSITION` says how many of its rows are taken.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def is_open(self) -> bool:
        """Whether the state has a row for each token."""
        return self.shape[:1] == (OPEN,)

    def sized(self, room: int) -> tuple[int, ...]:
        """The shape, with room for so many tokens where it is open."""
        return (room, *self.shape[1:]) if self.is_open else self.shape

    def zeros(self, batch: int, device: torch.device | str = "cpu", room: int = 0) -> Tensor:
        """The state of `batch` fresh sequences, [batch, *shape]."""
        return torch.zeros((batch, *self.sized(room)), dtype=self.dtype, device=device)

    def extended(self, state: Tensor, room: int) -> Tensor:
        """An open state with room for at least so many tokens; itself where it has that."""
        had = state.shape[1]
        if had >= room:
            return state
        longer = self.zeros(len(state), state.device, room)
        longer[:, :had] = state
        return longer


def fresh_states(
    specs: Iterable[StateSpec], batch: int, device: torch.device | str = "cpu", room: int = 0
) -> States:
    """All states of `batch` fresh sequences; open ones with room for `room` tokens."""
    return {spec.name: spec.zeros(batch, device, room) for spec in specs}


def with_room(specs: Sequence[StateSpec], states: States, tokens: int) -> States:
    """The states, with twice the room or more in those that are open, if they lack it for `tokens`.

    Some of the states are open.
    """
    needed = int(states[POSITION].max()) + tokens
    had = min(states[spec.name].shape[1] for spec in specs if spec.is_open)
    return states if needed <= had else extended_states(specs, states, max(needed, 2 * had))


def extended_states(specs: Iterable[StateSpec], states: States, room: int) -> States:
    """The states, with room for at least `room` tokens in those that are open."""
    return states | {s.name: s.extended(states[s.name], room) for s in specs if s.is_open}
