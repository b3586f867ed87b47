"""One plan for every architecture: rewrites stay exact, and lowered is simulated, bit by bit."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
from core.tiny import apply, error
from frontend.models import ARCHITECTURES, build, tokens
from tiny import compile_tiny

from ssmc.core import Context, Graph, is_call, make_plan, run_passes
from ssmc.core.dialect import operands
from ssmc.core.options import parse_passes
from ssmc.frontend import trace
from ssmc.passes._transformer import LINEARS, mlps
from ssmc.runtime import CompiledModel
from ssmc.runtime.verify import verify

LAST = ("out_proj", "o_proj", "down_proj")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rewrites(architecture: str) -> None:
    g = trace(build(architecture))
    batch = (tokens(4, 33),)
    expected, _ = g(*batch)
    passes = "fold-norm,hadamard{residual=true},smooth,fold-a-log"
    report = run_passes(g, make_plan(parse_passes(passes)), Context([batch], batch))
    assert error(g(*batch)[0], expected) < 1e-5
    records = {record.name: record for record in report.records}
    assert records["hadamard"].skipped == []
    rotated = [n for n in g.nodes if n.meta.get("role") in LAST]
    assert len(g.calls("ssmc::hadamard")) == len(rotated)
    assert all(operands(n)["x"].target is g.calls("ssmc::hadamard")[0].target for n in rotated)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_everything_in_eight_bits(architecture: str) -> None:
    compiled = compile_tiny(architecture, "hadamard{residual=true},percentile,quantise,kv-cache")
    assert compiled.lowered.kept == []
    assert [c for c in verify(compiled, tokens(2, 21)) if not c.agrees] == []
    found = verify(CompiledModel(compiled.artefact, "reference"), tokens(2, 21))
    assert {c.form for c in found} == {"sequence", "step"}
    assert all(c.differing == 0 and c.error == 0 for c in found)
    assert compiled.about["metrics"]["probe_signal_to_noise_db"] > 20


BESIDE = {"zamba2": "shared_transformer", "zamba2-adapters": "shared_transformer"}
"""Where a layer stands between an MLP and the residual stream, which has no role."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_layer_has_a_role(architecture: str) -> None:
    g = _traced(architecture)
    without = [n for n in g.nodes if is_call(n, *LINEARS) and not n.meta.get("role")]
    assert all(BESIDE.get(architecture, "no") in str(n.args[0]) for n in without)
    assert len(without) == (0 if architecture not in BESIDE else len(mlps(g)))


# -- what is left out, and why --------------------------------------------------------------------

READ = "its input has another reader"
SCANNED = "selective_scan, which computes its input, cannot take a factor"
COMPUTED = ", which computes its input, cannot take a factor"  # by what has no weight
TIED = "its weight is tied: backbone.embeddings.weight"
MAMBA = {("x_proj", READ): 3, ("out_proj", SCANNED): 3}
NOT_SMOOTHED = {
    "mamba": MAMBA | {("head", TIED): 1},
    "mamba-no-conv-bias": MAMBA | {("head", TIED): 1},
    "falcon": MAMBA | {("head", TIED): 1},
    "jamba": MAMBA,
    "falcon-h1": {("out_proj", COMPUTED): 3},  # behind y * silu(z)
    "nemotron": {("down_proj", COMPUTED): 1},  # behind relu(x) ** 2
    "nemotron-experts": {("down_proj", COMPUTED): 2},
}
ALL_SMOOTHED = ["mamba2", "mamba2-groups", "llama", "llama-biases", "bamba", "granite", "qwen3"]
ALL_SMOOTHED += ["falcon-h1-norm"]
SMALL = {"x_proj", "dt_proj", "router"}
NOTHING = ["the model has nothing for it"]


@functools.cache
def _traced(architecture: str) -> Graph:
    return trace(build(architecture))


def _skipped(architecture: str, passes: str, name: str) -> Counter[tuple[str, str]]:
    """Role and reason of what the pass `name` left."""
    g, batch = _traced(architecture).copy(), (tokens(4, 33),)
    record = apply(g, passes, Context([batch], batch))[name]
    return Counter(
        (g.node(e["node"]).meta["role"] or "linear", e["reason"]) for e in record.skipped
    )


@pytest.mark.parametrize("architecture", [*NOT_SMOOTHED, *ALL_SMOOTHED])
def test_what_is_not_smoothed(architecture: str) -> None:
    found = _skipped(architecture, "smooth", "smooth")
    expected = NOT_SMOOTHED.get(architecture, {})
    assert Counter(role for role, _ in found.elements()) == Counter(
        role for (role, _), count in expected.items() for _ in range(count)
    )
    for role, reason in found:
        assert any(role == of and reason.endswith(end) for of, end in expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("scope", ["inout", "all"])
def test_which_layers_stay_in_float_with_weights_alone_quantised(
    architecture: str, scope: str
) -> None:
    few = f"quantise{{weights=4,group=8,activations=16,scope={scope}}}"
    found = _skipped(architecture, f"absmax,{few}", "quantise")
    roles = {n.meta["role"] for n in _traced(architecture).nodes if n.meta.get("role")}
    assert {role for role, _ in found} == (SMALL & roles if scope == "inout" else set())
    assert {reason for _, reason in found} <= {"out of scope, so in float"}


@pytest.mark.parametrize("architecture", ["mamba", "mamba2", "llama", "jamba", "nemotron"])
@pytest.mark.parametrize(
    ("passes", "operator"),
    [
        ("state{bits=8}", "scan"),
        ("reconstruct{steps=1,length=8},state{bits=8}", "scan"),
        ("sort-and-cluster", "scan"),
        ("kv-cache", "cache_append"),
    ],
)
def test_passes_for_what_a_model_does_not_have_say_so(
    architecture: str, passes: str, operator: str
) -> None:
    g, batch = _traced(architecture).copy(), (tokens(4, 33),)
    here = any(operator in str(node.target) for node in g.nodes)
    for record in apply(g, passes, Context([batch], batch)).values():
        if record.name in passes:
            assert (record.notes == NOTHING) == (not here)
            assert bool(record.matched or record.skipped) == here
