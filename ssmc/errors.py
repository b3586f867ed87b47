"""Errors with an exit code: one readable message each (what, where, what to do next)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SsmcError(Exception):
    """Base of every error that ends a command with a message instead of a traceback.

    `hint` says what to do next; it is printed on its own line.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class PassError(SsmcError):
    """A pass failed, or changed the result by more than it may."""


class VerifyError(SsmcError):
    """Simulated and lowered execution differ by more than the stated tolerance."""


class NumericsError(SsmcError):
    """NaN or infinity in a weight or an activation."""


class SearchError(SsmcError):
    """No choice of bits was found that keeps to the bound."""


class RankError(SsmcError):
    """Another of the processes that share the work has ended."""


class UsageError(SsmcError):
    """Wrong option, recipe, input file or output folder."""

    exit_code = 2


class ArtefactError(UsageError):
    """An artefact that is truncated, altered, or of a schema this version cannot read."""


class UnsupportedError(SsmcError):
    """A model whose architecture is not supported or cannot be traced."""

    exit_code = 3


class DeviceError(SsmcError):
    """A device that is missing or out of memory."""

    exit_code = 4


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A hint naming the known names closest to `name`, or None where nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else None


def choices(name: str, known: Iterable[str]) -> str:
    """A hint for a name outside a short list: the closest ones, or the whole list."""
    known = list(known)
    return did_you_mean(name, known) or f"there are {', '.join(known)}"
