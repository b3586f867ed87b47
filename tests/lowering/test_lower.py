"""What is lowered, what is kept, and that the graph handed in stays."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from frontend.models import build, tokens
from tiny import compile_tiny

import ssmc
from ssmc.core import Graph
from ssmc.core.dialect import target_name
from ssmc.core.text import graph_text
from ssmc.errors import UsageError
from ssmc.lowering import Backend, lower
from ssmc.lowering.backends.plain import PLAIN, int8_causal_conv1d, int8_linear
from ssmc.lowering.backends.reference import REFERENCE
from ssmc.lowering.patterns import HEAVY
from ssmc.quant.weights import quantize_groups
from ssmc.runtime import CompiledModel

ARCHITECTURES = ["mamba", "mamba-no-conv-bias", "falcon", "mamba2", "mamba2-groups"]
BACKENDS = [REFERENCE, PLAIN]  # those that give the bits of the simulation
SHAPES = [(1, 1), (3, 2), (2, 17), (1, 63)]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request: pytest.FixtureRequest) -> CompiledModel:
    return compile_tiny(request.param)


def operators(graph: Graph) -> set[str]:
    return {target_name(n.target) for n in graph.nodes if n.op == "call_function"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_lowers_every_heavy_operator(compiled: CompiledModel, backend: Backend) -> None:
    lowered = lower(compiled.graph, backend)
    heavy = [n.name for name in HEAVY for n in compiled.graph.calls(name)]
    assert lowered.kept == []
    assert sorted(lowered.fused) == sorted(heavy)
    assert len(heavy) >= 1 + 3 * 4 + 1  # embedding; in_proj, conv, scan, out_proj a layer; head
    assert not operators(lowered.graph) & set(HEAVY)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_lowered_logits_are_the_simulated_bit_for_bit(
    compiled: CompiledModel, backend: Backend, shape: tuple[int, int]
) -> None:
    lowered, ids = lower(compiled.graph, backend), tokens(*shape)
    assert torch.equal(lowered.graph(ids)[0], compiled.graph(ids)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_from_states_equals_the_simulation(
    compiled: CompiledModel, backend: Backend
) -> None:
    lowered, ids = lower(compiled.graph, backend).graph, tokens(2, 12)
    cuts = (0, 7, 8, 9, 12)
    pieces = [ids[:, a:b] for a, b in pairwise(cuts)]
    states = simulated_states = None
    for piece in pieces:
        logits, states = lowered(piece, states=states)
        expected, simulated_states = compiled.graph(piece, states=simulated_states)
        assert torch.equal(logits, expected)


def test_prefill_in_pieces_equals_the_whole(compiled: CompiledModel) -> None:
    program, ids = compiled.lowered.graph, tokens(2, 12)
    whole, _ = program(ids)
    head, states = program(ids[:, :7])
    tail, _ = program(ids[:, 7:], states=states)
    pieces = torch.cat([head, tail], 1)
    # Other chunks of a scan round otherwise in float32, which may move an 8-bit value by one.
    assert (pieces - whole).norm() / whole.norm() < 2e-3


def test_convolution_states_are_int8(compiled: CompiledModel) -> None:
    _, states = compiled.lowered.graph(tokens(2, 5))
    kinds = {name.rpartition("_")[2]: state.dtype for name, state in states.items()}
    assert sorted(kinds.values(), key=str) == [torch.float32, torch.int8]
    assert kinds["conv"] == torch.int8
    specs = {spec.name: spec.dtype for spec in compiled.lowered.graph.states}
    assert specs == {name: state.dtype for name, state in states.items()}


def test_the_graph_handed_in_stays(compiled: CompiledModel) -> None:
    graph, ids = compiled.graph, tokens(2, 9)
    text, states, logits = graph_text(graph), graph.states, graph(ids)[0]
    for backend in BACKENDS:
        lower(graph, backend)
    assert graph_text(graph) == text
    assert graph.states == states
    assert all(spec.dtype == torch.float32 for spec in graph.states)
    assert torch.equal(graph(ids)[0], logits)


@pytest.mark.parametrize("option", ["embedding", "head"])
def test_what_is_left_in_float_is_kept_with_a_reason(option: str) -> None:
    compiled = compile_tiny("mamba2", f"hadamard,percentile,quantise{{{option}=false}}")
    (kept,) = compiled.lowered.kept
    assert kept["node"] == {"embedding": "backbone_embeddings", "head": "lm_head"}[option]
    assert "not quantised" in kept["reason"]
    assert kept["node"] not in compiled.lowered.fused
    ids = tokens(2, 9)
    assert torch.equal(compiled(ids)[0], compiled.graph(ids)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_4_bits_give_the_simulated_bits(backend: Backend) -> None:
    compiled = compile_tiny("mamba2", "hadamard,percentile,quantise{weights=4,group=8}")
    lowered, ids = lower(compiled.graph, backend), tokens(2, 9)
    assert lowered.kept == []
    assert torch.equal(lowered.graph(ids)[0], compiled.graph(ids)[0])


def test_without_quantisation_everything_is_kept() -> None:
    compiled = ssmc.compile(
        build("mamba"), passes="fold-norm", scheme="none", calibration=tokens(2, 9)
    )
    assert compiled.lowered.fused == []
    assert len(compiled.lowered.kept) == 1 + 3 * (4 + 2) + 1  # embedding, blocks, head


def test_an_unknown_backend_is_a_usage_error(compiled: CompiledModel) -> None:
    with pytest.raises(UsageError, match="unknown backend 'cpuu'") as caught:
        lower(compiled.graph, "cpuu")
    assert caught.value.hint == "did you mean cpu?"
    with pytest.raises(UsageError) as caught:
        lower(compiled.graph, "xyz")
    assert caught.value.hint == "there are reference, cpu, triton"


# -- kernels of the cpu backend against the operators ---------------------------------------------


def int8(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def scales(*shape: int) -> torch.Tensor:
    return (torch.rand(shape) + 0.01).bfloat16().float()


@pytest.mark.parametrize("features", [1, 63, 1023, 1024, 1025, 2049, 5000])
@pytest.mark.parametrize("dynamic", [False, True])
def test_int8_linear_is_the_operator_bit_for_bit(features: int, dynamic: bool) -> None:
    x, w = int8(2, 3, features), int8(11, features)
    x_scale = scales(2, 3, 1) if dynamic else scales()
    for bias in (None, torch.randn(11)):
        args = (x, x_scale, w, scales(11, 1), bias)
        assert torch.equal(int8_linear(*args), torch.ops.ssmc.int8_linear(*args))


@pytest.mark.parametrize("group", [2, 8, 32])
def test_int8_linear_of_packed_weights_is_the_operator_bit_for_bit(group: int) -> None:
    packed, scale = quantize_groups(torch.randn(11, 64), group)
    for bias in (None, torch.randn(11)):
        args = (int8(2, 3, 64), scales(2, 3, 1), packed, scale, bias)
        assert torch.equal(int8_linear(*args), torch.ops.ssmc.int8_linear(*args))


@pytest.mark.parametrize("features", [1024, 1025, 4097])
def test_int8_linear_sums_extreme_products_exactly(features: int) -> None:
    x, w = (torch.full((1, features), 127, dtype=torch.int8) for _ in range(2))
    x[0, -1] = 1  # odd sums, of which float32 holds those below 2^24 only
    one, total = torch.ones(()), 127 * 127 * (features - 1) + 127
    assert int8_linear(x, one, w, one).item() == torch.tensor(total).float().item()
    x[0, features // 2 :] *= -1
    total = 127 * 127 * (features // 2 - (features - 1 - features // 2)) - 127
    assert int8_linear(x, one, w, one).item() == total


@pytest.mark.parametrize("features", [2049, 5000])
def test_int8_linear_rounds_sums_beyond_float32_once(features: int) -> None:
    x, w = int8(50, features).clamp_min(90), int8(50, features).clamp_min(90)
    args = (x, scales(50, 1), w, scales(50, 1))
    assert (x.long() @ w.long().T).min() > 2**24
    assert torch.equal(int8_linear(*args), torch.ops.ssmc.int8_linear(*args))


@pytest.mark.parametrize("length", [1, 2, 3, 17])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("carried", [False, True])
def test_int8_causal_conv1d_is_the_operator_bit_for_bit(
    length: int, activation: str, carried: bool
) -> None:
    state = int8(2, 3, 7) if carried else None
    for bias in (None, torch.randn(7)):
        args = (int8(2, length, 7), scales(7), int8(7, 4), scales(7, 1), bias, state, activation)
        got, expected = int8_causal_conv1d(*args), torch.ops.ssmc.int8_causal_conv1d(*args)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        assert got[1].dtype == torch.int8
