"""torch.export sees the same program as the tracer."""

from __future__ import annotations

import pytest
import torch

from ssmc.core.state import fresh_states
from ssmc.frontend import trace
from ssmc.frontend.export import export_program

from .models import SHAPES, build, error, tokens


@pytest.mark.parametrize("architecture", ["mamba", "mamba2-groups", "llama", "jamba"])
def test_both_front_ends_give_the_same_logits(architecture: str) -> None:
    model = build(architecture)
    graph = trace(model)
    exported, states = export_program(model)
    assert tuple(states) == graph.states
    module = exported.module()
    for batch, length in SHAPES:
        ids = tokens(batch, length)
        with torch.no_grad():
            expected, new = module(ids, *fresh_states(states, batch, room=length).values())
        actual, new_states = graph(ids)
        assert error(actual, expected) < 1e-5
        for mine, theirs in zip(new_states.values(), new, strict=True):
            assert error(mine, theirs) < 1e-5
    assert all("forward" not in vars(child) for child in model.modules())
