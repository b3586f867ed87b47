"""Keys and values in 8 bits between calls."""

from __future__ import annotations

import pytest
import torch
from core.tiny import apply, error, graph, logits, toy_context
from frontend.models import tokens
from tiny import compile_tiny
from torch import Tensor, nn

from ssmc import ops
from ssmc.core import Graph
from ssmc.core.state import OPEN, POSITION, States
from ssmc.frontend import register_adapter, trace
from ssmc.quant.formats import dequantize_tensor
from ssmc.recipe import make_recipe
from ssmc.runtime import CompiledModel, Session
from ssmc.runtime.verify import verify

IDS = tokens(2, 20)


def rounded() -> Graph:
    g = graph("llama")
    apply(g, "kv-cache")
    return g


def in_parts(g: Graph, parts: list[int]) -> tuple[Tensor, States]:
    outputs, states = [], None
    for part in IDS.split(parts, 1):
        output, states = g(part, states=states)
        outputs.append(output)
    assert states is not None
    return torch.cat(outputs, 1), states


def test_states_are_integers_and_a_scale_a_token_and_head() -> None:
    g = graph("llama")
    record = apply(g, "kv-cache")["kv-cache"]
    assert (len(record.matched), record.skipped) == (4, [])
    assert record.notes == ["caches take 96 bytes a token, before 320"]
    shapes = {s.name: (s.shape, s.dtype) for s in g.states}
    for name in ("l0_k", "l0_v", "l1_k", "l1_v"):
        assert shapes[name] == ((OPEN, 2, 10), torch.int8)
        assert shapes[f"{name}_scale"] == ((OPEN, 2, 1), torch.bfloat16)
    assert shapes[POSITION] == ((), torch.int64)
    assert [n.name for n in g.new_states[:3]] == ["position_next", "l0_k_next", "l0_v_next"]


def test_each_row_is_the_nearest_integers() -> None:
    _, states = rounded()(IDS)
    _, exact = graph("llama")(IDS)
    twin = dequantize_tensor(states["l0_k"], states["l0_k_scale"].float())
    step = exact["l0_k"].abs().amax(-1, keepdim=True) / 127
    assert ((twin - exact["l0_k"]).abs() <= step * 0.51).all()
    assert error(logits(rounded()), logits(graph("llama"))) < 1e-2


@pytest.mark.parametrize("parts", [[9, 1, 10], [1] * 20])
def test_in_parts_as_in_one_call(parts: list[int]) -> None:
    g = rounded()
    expected, whole = g(IDS)
    actual, states = in_parts(g, parts)
    assert error(actual, expected) < 2e-3  # a value at the edge of a step may be rounded to either
    differing = (states["l0_v"][:, :20] != whole["l0_v"][:, :20]).double().mean()
    assert differing < 1e-2


def test_rows_are_rounded_once() -> None:
    g = rounded()
    _, states = g(IDS[:, :12])
    before = {name: states[name].clone() for name in ("l1_k", "l1_k_scale")}
    for token in IDS[:, 12:].split(1, 1):
        _, states = g(token, states=states)
    assert all(torch.equal(states[name][:, :12], value) for name, value in before.items())


class Doubled(nn.Module):
    """A cache that something else than attention reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_cache_that_is_read_otherwise_is_skipped() -> None:
    def forward(module: Doubled, state: States, x: Tensor) -> Tensor:
        heads, position = x.unflatten(-1, (2, 3)), state[POSITION]
        state["k"] = ops.cache_append(state["k"], heads, position)
        y = ops.attention(heads, state["k"], state["k"], position)
        return module.out(y.flatten(-2)) + state["k"].sum((1, 2, 3), keepdim=True).flatten(-2)

    row = {POSITION: (), "k": (OPEN, 2, 3)}
    remove = register_adapter(lambda m: isinstance(m, Doubled), forward, lambda m: row)
    try:
        g = trace(Doubled(), torch.zeros(2, 5, 6))
    finally:
        remove()
    record = apply(g, "kv-cache", toy_context())["kv-cache"]
    assert record.matched == []
    assert record.skipped[0]["reason"] == "another call than attention reads its cache"


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    return compile_tiny("llama", "hadamard,percentile,quantise,kv-cache")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_lowered_is_simulated(compiled: CompiledModel, backend: str) -> None:
    model = CompiledModel(compiled.artefact, backend, "cpu")
    found = verify(model, tokens(2, 21))
    assert {c.operator for c in found} >= {"ssmc::int8_attention", "ssmc::int8_linear"}
    assert all(c.agrees for c in found)
    assert backend == "cpu" or all(c.differing == 0 and c.error == 0 for c in found)


def test_sessions_hold_integers(compiled: CompiledModel) -> None:
    session: Session = compiled.session(2)
    assert session.states["l0_k"].dtype == torch.int8
    ids, states = tokens(2, 9), None
    for token in ids.split(1, 1):
        whole, states = compiled(token, states=states)
        assert torch.equal(session.step(token), whole[:, -1])


def test_it_stands_beside_a_scheme() -> None:
    for passes in ("hadamard,kv-cache", "kv-cache"):
        plan = [p.name for p in make_recipe(passes=passes, scheme="w8a8").plan()]
        assert {"quantise", "kv-cache"} <= set(plan)
