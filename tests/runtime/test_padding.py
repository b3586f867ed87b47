"""Padded batches: every row gives what it gives alone, and goes on as alone."""

from __future__ import annotations

import pytest
import torch
from frontend.models import ARCHITECTURES, build, error, logits, tokens
from tiny import compile_tiny

from ssmc.errors import UsageError
from ssmc.frontend import trace
from ssmc.runtime import Artefact, CompiledModel
from ssmc.runtime.padding import real_tokens

LENGTHS = (9, 2, 6)
MASK = torch.tensor([[0] * (9 - n) + [1] * n for n in LENGTHS])


def test_where_the_tokens_of_a_row_are() -> None:
    ids = tokens(2, 3)
    assert real_tokens(torch.ones(2, 3), ids) is None
    assert real_tokens(torch.tensor([[0, 1, 1], [1, 1, 0]]), ids) == [(1, 3), (0, 2)]
    for row, what in (([1, 0, 1], "a hole"), ([0, 0, 0], "nothing but padding")):
        with pytest.raises(UsageError, match=f"row 1 of attention_mask has {what}"):
            real_tokens(torch.tensor([[1, 1, 1], row]), ids)
    with pytest.raises(UsageError, match=r"has the shape \[2, 4\]") as caught:
        real_tokens(torch.ones(2, 4), ids)
    assert "[2, 3], as input_ids" in str(caught.value.hint)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_padded_on_the_left_are_the_eager_models_alone(architecture: str) -> None:
    eager = build(architecture)
    model = CompiledModel(Artefact(trace(eager)), "reference")
    ids = tokens(3, 9)
    found, _ = model(ids, attention_mask=MASK)
    generated = model.generate(ids, 4, attention_mask=MASK)[:, 9:]
    for row, length in enumerate(LENGTHS):
        alone = ids[row : row + 1, -length:]
        assert error(found[row : row + 1, -length:], logits(eager, alone)) < 1e-5
        assert not found[row, :-length].any()
        for _ in range(4):
            chosen = logits(eager, alone)[:, -1:].argmax(-1)
            alone = torch.cat([alone, chosen], 1)
        assert torch.equal(generated[row], alone[0, length:])


@pytest.mark.parametrize("execution", ["lowered", "simulated"])
def test_states_of_padded_rows_go_on_together(execution: str) -> None:
    model = compile_tiny("jamba", "hadamard,percentile,quantise,kv-cache")
    model.execution = execution  # type: ignore[assignment]
    ids, following = tokens(3, 9), tokens(3, 2)
    _, states = model(ids, attention_mask=MASK)
    together, _ = model(following, states=states)
    for row, length in enumerate(LENGTHS):
        _, own = model(ids[row : row + 1, -length:])
        alone, _ = model(following[row : row + 1], states=own)
        assert torch.equal(together[row : row + 1], alone)


def test_padding_behind_states_is_refused() -> None:
    model = compile_tiny("mamba")
    _, states = model(tokens(3, 4))
    with pytest.raises(UsageError, match="fresh sequences"):
        model(tokens(3, 9), states=states, attention_mask=MASK)
