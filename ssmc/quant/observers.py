"""Streaming observers of the range of an activation: exact, however the tokens are batched."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmc.errors import NumericsError, UsageError


class Observer(ABC):
    """The range of |x|, for each channel and for the whole tensor, over all tokens observed.

    A subclass keeps what it needs of the magnitudes of some tokens (`_update`), joins what two
    observers kept (`_join`) and computes the two ranges from it. `kept` are the attributes that
    hold what it keeps.
    """

    kept: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.tokens = 0

    def observe(self, x: Tensor) -> None:
        """Take in x [..., C]; NaN and infinity stay, for `check` to find."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if len(x):
            self._count(len(x))
            self._update(x)

    def check(self) -> None:
        """Raise NumericsError where something observed holds NaN or infinity."""
        if not all(kept.isfinite().all() for kept in self.tensors().values()):
            raise NumericsError(
                "what was observed holds NaN or infinity",
                hint="check the model in float32 on this text, before any pass",
            )

    def merge(self, other: Self) -> None:
        """Become what one observer of both observers' tokens would be."""
        self._count(other.tokens)
        self._join(other)

    def tensors(self) -> dict[str, Tensor]:
        """What was kept of the tokens so far, by name."""
        kept = {name: getattr(self, name) for name in self.kept}
        return {name: value for name, value in kept.items() if value is not None}

    def restore(self, tokens: int, tensors: Mapping[str, Tensor]) -> None:
        """Become what an observer was when it had seen so many tokens and kept these `tensors`."""
        self.tokens = tokens
        for name in self.kept:
            setattr(self, name, tensors.get(name))

    def to(self, device: torch.device) -> None:
        """Move what is kept."""
        self.restore(
            self.tokens, {name: value.to(device) for name, value in self.tensors().items()}
        )

    def _count(self, tokens: int) -> None:
        self.tokens += tokens

    @abstractmethod
    def _update(self, x: Tensor) -> None:
        """Take in float32 values [tokens, C]."""

    @abstractmethod
    def _join(self, other: Self) -> None: ...

    @abstractmethod
    def channel(self) -> Tensor:
        """The range of each channel, float32 [C]; UsageError before the first token."""

    @abstractmethod
    def tensor(self) -> Tensor:
        """The range of the whole tensor, float32 []; UsageError before the first token."""


class Absmax(Observer):
    """The largest magnitude."""

    kept = ("_largest",)
    _largest: Tensor | None = None

    def _update(self, x: Tensor) -> None:
        self._raise_to(x.amax(0).maximum(-x.amin(0)).abs())

    def _join(self, other: Absmax) -> None:
        if other._largest is not None:
            self._raise_to(other._largest)

    def _raise_to(self, absmax: Tensor) -> None:
        self._largest = absmax if self._largest is None else self._largest.maximum(absmax)

    def channel(self) -> Tensor:
        """The largest magnitude of each channel."""
        return _seen(self._largest)

    def tensor(self) -> Tensor:
        """The largest magnitude of all."""
        return self.channel().amax()


class Percentile(Observer):
    """The p-quantile of the magnitude, with linear interpolation as in torch.quantile.

    `total` announces the tokens that all merged observers will see together, at most: it bounds
    the memory, since only the largest magnitudes that the quantile of so many can depend on are
    kept. Raises UsageError for p outside [0, 1] and for more tokens than announced.
    """

    kept = ("_channels", "_whole")

    def __init__(self, p: float, total: int) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise UsageError(f"percentile p={p}", hint="p is a fraction between 0 and 1")
        self.p = p
        self.total = total
        self._channels: Tensor | None = None  # [kept, C], descending
        self._whole: Tensor | None = None  # [kept, 1], descending

    def _count(self, tokens: int) -> None:
        if self.tokens + tokens > self.total:
            raise UsageError(
                f"percentile observer: {self.tokens + tokens} tokens, {self.total} were announced",
                hint="announce the number of tokens of all calibration batches together",
            )
        super()._count(tokens)

    def _update(self, x: Tensor) -> None:
        magnitude = x.abs()
        self._keep(magnitude, magnitude.reshape(-1, 1))

    def _join(self, other: Percentile) -> None:
        if other._channels is not None and other._whole is not None:
            self._keep(other._channels, other._whole)

    def _keep(self, channels: Tensor, whole: Tensor) -> None:
        total = self.total * channels.shape[1]
        self._channels = _largest(self._channels, channels, _kept(self.p, self.total))
        self._whole = _largest(self._whole, whole, _kept(self.p, total))

    def channel(self) -> Tensor:
        """The p-quantile over the tokens, for each channel."""
        return _quantile(_seen(self._channels), self.p, self.tokens)

    def tensor(self) -> Tensor:
        """The p-quantile over tokens and channels."""
        count = self.tokens * _seen(self._channels).shape[1]
        return _quantile(_seen(self._whole), self.p, count).squeeze()


def _seen(value: Tensor | None) -> Tensor:
    if value is None:
        raise UsageError("observer saw no tokens", hint="calibrate with at least one token")
    return value


def _kept(p: float, total: int) -> int:
    """How many of the largest of `total` values reach down to the p-quantile."""
    return total - math.floor(p * (total - 1))


def _largest(kept: Tensor | None, values: Tensor, k: int) -> Tensor:
    """The k largest (or all) of each column of kept and values [n, C] together, descending."""
    size = math.isqrt(len(values) // k)
    if size > 4:
        values = _candidates(values, k, size)
    both = values if kept is None else torch.cat([kept, values])
    return both.topk(min(k, len(both)), dim=0).values


def _candidates(values: Tensor, k: int, size: int) -> Tensor:
    """A part of each column of values [n, C] that holds its k largest: [k * size, C].

    They lie in the k groups of `size` rows with the largest maxima. For few of many values this
    is several times faster than topk alone.
    """
    groups = F.pad(values, (0, 0, 0, -len(values) % size)).unflatten(0, (-1, size))
    best = groups.amax(1).topk(k, dim=0).indices
    return groups.gather(0, best.unsqueeze(1).expand(-1, size, -1)).flatten(0, 1)


def _quantile(descending: Tensor, p: float, count: int) -> Tensor:
    """The p-quantile of each column of `count` values, of which the largest are given."""
    rank = p * (count - 1)
    below = math.floor(rank)
    lower = descending[count - 1 - below].double()
    upper = descending[max(count - 2 - below, 0)].double()
    return torch.lerp(lower, upper, rank - below).float()
