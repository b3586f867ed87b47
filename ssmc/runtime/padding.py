"""Batches whose rows are padded: padding is not run, so a row gives what it gives alone.

What pads a prompt would go into its states, and into the windows of its convolutions. So rows run
one by one, over their own tokens, and are put side by side afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ssmc.core.state import States, StateSpec
from ssmc.errors import UsageError

Span = tuple[int, int]
Program = Callable[..., tuple[Tensor, States]]


def real_tokens(mask: Tensor, ids: Tensor) -> list[Span] | None:
    """Where the tokens of each row of ids [batch, length] begin and end by a mask; None for all.

    The mask is 0 where a row is padded. Raises UsageError for one of another shape, for a row with
    a hole and for one with nothing.
    """
    if mask.shape != ids.shape[:2]:
        raise UsageError(
            f"attention_mask has the shape {list(mask.shape)}",
            hint=f"it is {list(ids.shape[:2])}, as input_ids: 1 for tokens, 0 for padding",
        )
    present = mask.bool()
    if bool(present.all()):
        return None
    spans = []
    for row, found in enumerate(present.cpu()):
        places = found.nonzero().flatten().tolist()
        if not places or len(places) != places[-1] - places[0] + 1:
            what = "a hole" if places else "nothing but padding"
            raise UsageError(
                f"row {row} of attention_mask has {what}", hint="pad at an end of each row"
            )
        spans.append((places[0], places[-1] + 1))
    return spans


def run_padded(
    program: Program, ids: Tensor, spans: Sequence[Span], specs: Sequence[StateSpec]
) -> tuple[Tensor, States]:
    """Logits [batch, length, vocabulary] of fresh sequences, zero where padded; their states."""
    logits, states = [], []
    for row, (start, end) in zip(ids, spans, strict=True):
        found, state = program(row[None, start:end])
        logits.append(torch.nn.functional.pad(found, (0, 0, start, len(row) - end)))
        states.append(state)
    return torch.cat(logits), {spec.name: _together(spec, states) for spec in specs}


def _together(spec: StateSpec, states: Sequence[States]) -> Tensor:
    """A state of sequences of one each; caches get the room of the longest."""
    rows = [state[spec.name] for state in states]
    if spec.is_open:
        room = max(row.shape[1] for row in rows)
        rows = [spec.extended(row, room) for row in rows]
    return torch.cat(rows)
