"""Weights in every format: lowered where there is a product for it, left in float where not."""

from __future__ import annotations

import pytest
import torch
from frontend.models import tokens
from tiny import compile_tiny

from ssmc.core.pipeline import relative_error
from ssmc.lowering import lower
from ssmc.passes.gptq import Gptq
from ssmc.runtime import CompiledModel
from ssmc.runtime.verify import verify

from .rules import clones, fused, same_states

ROTATED = "hadamard,percentile"
INTEGERS = {
    "rows of 4 bits": "weights=4",
    "one scale of 4 bits": "weights=4,granularity=tensor",
    "all of 4 bits": "weights=4,group=8,scope=all",
    "3 bits": "weights=3,group=8",
    "groups of 8 bits": "weights=8,group=8",
}


@pytest.fixture(scope="module", params=["mamba", "mamba2"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_give_the_simulated_bits(kind: str, name: str) -> None:
    compiled = compile_tiny(kind, f"{ROTATED},quantise{{{INTEGERS[name]}}}")
    ids = tokens(2, 9)
    expected, states = compiled.graph(ids)
    for backend in ("reference", "cpu"):
        assert torch.equal(lower(compiled.graph, backend).graph(ids)[0], expected)
    assert torch.equal(fused(compiled.graph).graph(ids)[0], expected)
    assert all(c.agrees for c in verify(compiled, ids))
    step = tokens(2, 1)
    plain, program = lower(compiled.graph, "reference").graph, fused(compiled.graph, "step").graph
    _, states = plain(ids)
    logits, expected_states = plain(step, states=states)
    got, new_states = program(step, states=clones(states))
    assert torch.equal(got, logits)
    assert same_states(new_states, expected_states)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ("weights=4", set()),
        ("weights=4,group=8,scope=all", set()),
        ("weights=3,group=8", {"in_proj", "out_proj"}),
        ("weights=8,group=8", {"in_proj", "out_proj"}),
    ],
)
def test_products_that_there_are(kind: str, options: str, kept: set[str]) -> None:
    compiled = compile_tiny(kind, f"{ROTATED},quantise{{{options}}}")
    assert roles_kept(compiled) == kept


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_only(kind: str, bits: int) -> None:
    compiled = compile_tiny(kind, f"{ROTATED},quantise{{weights={bits},group=8,activations=16}}")
    projections = {"in_proj", "out_proj"}
    assert roles_kept(compiled) & projections == (set() if bits == 4 else projections)
    ids = tokens(2, 9)
    assert relative_error(compiled(ids)[0], compiled.graph(ids)[0]) < 1e-5
    assert all(c.agrees for c in verify(compiled, ids))
    assert all(t.dtype == torch.float32 for t in compiled(ids)[1].values())


def roles_kept(compiled: CompiledModel) -> set[str]:
    """The roles of the calls that lowering left in float."""
    return {compiled.graph.node(k["node"]).meta["role"] for k in compiled.lowered.kept}


def test_an_artefact_with_gptq_is_what_was_compiled(tmp_path: object) -> None:
    import ssmc

    passes = f"{ROTATED},quantise{{weights=3,group=8,activations=16,scope=all}},gptq{{x_proj=true}}"
    compiled = compile_tiny("mamba", passes)
    again = compile_tiny("mamba", passes)
    assert compiled.graph.params().keys() == again.graph.params().keys()
    for name, tensor in again.graph.params().items():
        assert torch.equal(compiled.graph.params()[name], tensor)
    loaded = ssmc.load(str(compiled.save(f"{tmp_path}/out")), device="cpu")
    ids = tokens(2, 9)
    assert torch.equal(loaded(ids)[0], compiled(ids)[0])
    assert loaded.about["recipe"]["passes"][-1] == {"gptq": Gptq(x_proj=True).options()}
