"""The rules of the triton backend: fused operators give the same bits as the graph they replace."""

from __future__ import annotations

import pytest
import torch
from frontend.models import tokens
from tiny import compile_tiny
from torch import fx

from ssmc.core import Graph, is_call
from ssmc.core.text import graph_text
from ssmc.lowering import Form, lower
from ssmc.runtime import CompiledModel

from .rules import RULES, calls, clones, fused, same_states

ROTATED = "hadamard,percentile"
VARIANTS = {
    "mamba": ("mamba", ROTATED),
    "biases": ("mamba-no-conv-bias", ROTATED),
    "inner-norms": ("falcon", ROTATED),
    "mamba2": ("mamba2", ROTATED),
    "groups": ("mamba2-groups", ROTATED),
    "no-rotation": ("mamba", "percentile"),
    "mamba2-no-rotation": ("mamba2", "percentile"),
    "rotated-residual": ("mamba", "hadamard{residual=true},percentile"),
    "tensor": ("mamba", f"{ROTATED},quantise{{granularity=tensor}}"),
    "mamba2-tensor": ("mamba2", f"{ROTATED},quantise{{granularity=tensor}}"),
    "state": ("mamba", f"{ROTATED},state"),
    "mamba2-state": ("mamba2", f"{ROTATED},state"),
    "w4a8": ("mamba", f"{ROTATED},quantise{{weights=4,group=8}}"),
    "mamba2-w4a8": ("mamba2", f"{ROTATED},quantise{{weights=4,group=8}}"),
    "w4a16": ("mamba", f"{ROTATED},quantise{{weights=4,activations=16,group=8}}"),
    "embedding": ("mamba", f"{ROTATED},quantise{{embedding=false}}"),
}


@pytest.fixture(scope="module", params=VARIANTS)
def compiled(request: pytest.FixtureRequest) -> CompiledModel:
    return compile_tiny(*VARIANTS[request.param])


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 17)])
def test_a_sequence_gives_the_bits_of_the_unfused_graph(
    compiled: CompiledModel, shape: tuple[int, int]
) -> None:
    plain, program = lower(compiled.graph, "reference").graph, fused(compiled.graph).graph
    states = expected_states = None
    for ids in (tokens(*shape), tokens(*shape)):  # from fresh states, then from carried ones
        expected, expected_states = plain(ids, states=expected_states)
        logits, states = program(ids, states=states)
        assert torch.equal(logits, expected)
        assert same_states(states, expected_states)


def test_the_last_position_has_the_bits_of_the_sequence(compiled: CompiledModel) -> None:
    for backend in ("reference", RULES):
        whole = lower(compiled.graph, backend).graph
        last = lower(compiled.graph, backend, "last").graph
        for shape in ((1, 1), (2, 17)):
            ids = tokens(*shape)
            (expected, expected_states), (logits, states) = whole(ids), last(ids)
            bound = reordering(last, whole, ids)
            assert torch.all((logits - expected[:, -1:]).abs() <= bound)
            assert same_states(states, expected_states)


def reordering(last: Graph, whole: Graph, ids: torch.Tensor) -> torch.Tensor:
    """How far the logits of one position may be from those of the sequence: 0 for integers.

    With weights alone quantised the head is a product of floats, and in which order a BLAS adds
    up its K terms depends on how many positions there are. Each order is within gamma_K |x| |W|
    of the exact sum, gamma_K = K u / (1 - K u), u = 2^-24 (Higham, 'Accuracy and stability of
    numerical algorithms', eq. 3.5), so two are within twice that; x has the same bits in both.
    """
    head = last.result
    if not is_call(head, "ssmc::linear"):
        return torch.zeros(())
    x, weight = (watched(last, node, ids) for node in head.args[:2])
    assert torch.equal(x, watched(whole, head.args[0], ids)[:, -1:])
    terms = x.shape[-1]
    gamma = terms * 2**-24 / (1 - terms * 2**-24)
    return 2 * gamma * (x.double().abs() @ weight.double().abs().T)


def watched(g: Graph, node: fx.Node, ids: torch.Tensor) -> torch.Tensor:
    """What the call named as `node` gives in `g`."""
    values: dict[str, torch.Tensor] = {}
    g.watch(lambda seen, value: values.update({seen.name: value}), ids)
    return values[node.name]


def test_steps_give_the_bits_of_the_sequence(compiled: CompiledModel) -> None:
    plain, step = lower(compiled.graph, "reference").graph, fused(compiled.graph, "step").graph
    _, states = plain(tokens(3, 5))
    expected_states = states
    for ids in tokens(3, 4).split(1, 1):
        expected, expected_states = plain(ids, states=expected_states)
        logits, states = step(ids, states=clones(states))
        assert torch.equal(logits, expected)
        assert same_states(states, expected_states)


@pytest.mark.parametrize("form", ["sequence", "last", "step"])
def test_values_keep_the_names_they_have_when_simulated(
    compiled: CompiledModel, form: Form
) -> None:
    lowered = fused(compiled.graph, form)
    names = [node.name for node in lowered.graph.nodes]
    simulated = {node.name for node in compiled.graph.nodes}
    assert len(set(names)) == len(names)
    assert set(lowered.fused) <= set(names)
    for new, old in zip(lowered.graph.new_states, compiled.graph.new_states, strict=True):
        assert new.name == old.name
    assert lowered.graph.result.name in {compiled.graph.result.name, "lm_head_last"}
    anew = {f for f in lowered.fused if f not in simulated}
    assert all(name.endswith("_fused") for name in anew)


def test_the_graph_handed_in_stays(compiled: CompiledModel) -> None:
    text, states = graph_text(compiled.graph), compiled.graph.states
    tensors = {name: t.data_ptr() for name, t in compiled.graph.params().items()}
    for form in ("sequence", "last", "step"):
        lowered = fused(compiled.graph, form).graph
        shared = {n: t.data_ptr() for n, t in lowered.params().items() if n in tensors}
        assert all(tensors[name] == pointer for name, pointer in shared.items())
    assert graph_text(compiled.graph) == text
    assert compiled.graph.states == states


# -- what a layer consists of ---------------------------------------------------------------------

EDGES = {"int8_embedding": 1, "rms_norm_quantize": 1, "int8_linear": 1}
STEP_EDGES = {"int8_embedding": 1, "norm_linear_step": 1}
MAMBA = {
    "rms_norm_quantize": 1,
    "int8_linear_quantize": 2,  # in_proj and dt_proj
    "int8_causal_conv1d_quantize": 1,
    "int8_linear_split": 1,
    "int8_selective_scan": 1,
    "hadamard_quantize": 1,
    "int8_linear_add": 1,
}
MAMBA_STEP = {
    "in_proj_conv_step": 1,
    "int8_linear": 1,  # x_proj
    "selective_scan_step": 1,
    "hadamard_quantize": 1,
    "int8_linear_add": 1,
}
MAMBA2 = {
    "rms_norm_quantize": 1,
    "int8_linear_quantize": 1,
    "int8_causal_conv1d_split": 1,
    "int8_ssd_scan": 1,
    "gated_norm_quantize": 1,
    "int8_linear_add": 1,
}
MAMBA2_STATE = MAMBA2 | {"int8_ssd_scan_state": 1}
del MAMBA2_STATE["int8_ssd_scan"]
MAMBA2_STEP = {
    "in_proj_conv_step": 1,
    "ssd_scan_step": 1,
    "gated_norm_quantize": 1,
    "int8_linear_add": 1,
}
FALCON = MAMBA | {"int8_linear": 1, "rms_norm_quantize": 4}  # norms of dt, B and C
del FALCON["int8_linear_split"]


@pytest.mark.parametrize(
    ("variant", "sequence", "step"),
    [
        ("mamba", MAMBA, MAMBA_STEP),
        ("biases", MAMBA, MAMBA_STEP),
        ("rotated-residual", MAMBA, MAMBA_STEP),
        ("w4a8", MAMBA, MAMBA_STEP),
        ("state", MAMBA | {"to_dtype": 2}, MAMBA_STEP),
        ("mamba2", MAMBA2, MAMBA2_STEP),
        ("groups", MAMBA2, MAMBA2_STEP),
        ("mamba2-no-rotation", MAMBA2, MAMBA2_STEP),
        ("mamba2-w4a8", MAMBA2, MAMBA2_STEP),
        ("mamba2-state", MAMBA2_STATE, MAMBA2_STEP),
    ],
)
def test_the_kernels_of_a_layer(
    variant: str, sequence: dict[str, int], step: dict[str, int]
) -> None:
    compiled = compile_tiny(*VARIANTS[variant])
    for form, layer, edges in (
        ("sequence", sequence, EDGES),
        ("last", sequence, EDGES),
        ("step", step, STEP_EDGES),
    ):
        lowered = fused(compiled.graph, form)  # type: ignore[arg-type]
        assert calls(lowered.graph) == edges
        for index in range(3):
            assert calls(lowered.graph, index) == layer
        assert lowered.kept == []


def test_what_does_not_match_stays_an_operator_of_its_own() -> None:
    falcon = compile_tiny(*VARIANTS["inner-norms"])
    assert calls(fused(falcon.graph).graph, 1) == FALCON
    step = calls(fused(falcon.graph, "step").graph, 1)
    assert step == {
        "in_proj_conv_step": 1,
        "int8_linear": 1,
        "rms_norm_quantize": 3,
        "int8_linear_quantize": 1,
        "int8_selective_scan": 1,
        "hadamard_quantize": 1,
        "int8_linear_add": 1,
    }
    unrotated = calls(fused(compile_tiny("mamba", "percentile").graph, "step").graph, 1)
    assert unrotated["quantize_dynamic"] == unrotated["int8_linear_add"] == 1


def test_scales_a_tensor_are_joined_over_the_channels() -> None:
    compiled = compile_tiny(*VARIANTS["tensor"])
    lowered = fused(compiled.graph).graph
    (in_proj, *_) = lowered.calls("ssmc::int8_linear_quantize")
    scale = lowered.param(in_proj.args[-1])
    width = in_proj.meta["val"].shape[-1]
    assert scale.shape == (width,)
    assert len(scale.unique()) <= 2
    assert calls(fused(compiled.graph, "step").graph, 1)["quantize"] > 0
