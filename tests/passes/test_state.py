"""The state of a scan in 16 bits between calls."""

import pytest
import torch
from core.tiny import KINDS, apply, context, error, graph

from ssmc.passes.state import DTYPE
from ssmc.recipe import make_recipe


@pytest.mark.parametrize("kind", KINDS)
def test_only_states_of_scans_are_rounded(kind: str) -> None:
    g = graph(kind)
    apply(g, "state")
    dtypes = {spec.name: spec.dtype for spec in g.states}
    assert {n for n, d in dtypes.items() if d == DTYPE} == {n for n in dtypes if "ssm" in n}
    assert [n.name for n in g.new_states] == [f"{name}_next" for name in dtypes]


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_from_fresh_states_is_unchanged(kind: str) -> None:
    plain, g = graph(kind), graph(kind)
    apply(g, "state")
    probe = context().probe or ()
    (expected, before), (result, after) = plain(*probe), g(*probe)
    assert torch.equal(result, expected)
    for name, state in after.items():
        assert torch.equal(state, before[name].to(state.dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_call_starts_from_the_rounded_state(kind: str) -> None:
    plain, g = graph(kind), graph(kind)
    apply(g, "state")
    (ids,) = context().probe or ()
    states = plain(ids)[1]
    rounded = {n: s.to(DTYPE).float() if "ssm" in n else s for n, s in states.items()}
    expected = plain(ids, states=rounded)[0]
    result = g(ids, states=g(ids)[1])[0]
    assert torch.equal(result, expected)
    assert 0 < error(result, plain(ids, states=states)[0]) < 0.05


def test_the_scheme_is_still_added() -> None:
    names = [p.name for p in make_recipe(passes="hadamard,percentile,state").plan()]
    assert "quantise" in names
    assert "state" in names
