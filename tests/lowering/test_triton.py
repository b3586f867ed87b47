"""The triton backend: what it needs, what it has kernels for, and that they agree when verified."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from frontend.models import build, tokens
from tiny import compile_tiny

import ssmc
from ssmc import ops
from ssmc.lowering import BACKENDS, Backend, Form, lower
from ssmc.lowering.backends import triton as backend
from ssmc.runtime import CompiledModel
from ssmc.runtime.verify import verify

from .rules import RULES, calls

OF_RULES_OF_CPU = {
    "cache_quantize_step",
    "int8_expert_linear_sum",
    "normed_selective_scan_step",
    "position_step",
    "silu_mul_quantize",
}
"""Fused operators that only rules of the backend `cpu` make."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOWER = """
import sys
{before}
import ssmc.lowering
assert "triton" not in sys.modules or sys.modules["triton"] is None
try:
    ssmc.lowering.lower(None, "triton")
except ssmc.errors.DeviceError as error:
    print(error, "|", error.hint)
"""


@pytest.mark.parametrize(
    ("before", "message", "hint"),
    [
        ('sys.modules["triton"] = None', "needs Triton, which cannot be imported", "ssmc[cuda]"),
        ("", "needs a CUDA device", "--backend cpu"),
    ],
)
def test_without_triton_or_a_gpu_it_is_a_device_error(before: str, message: str, hint: str) -> None:
    if not before:
        pytest.importorskip("triton")
    hidden = {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    code = LOWER.format(before=before)
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | hidden
    )
    assert ran.returncode == 0, ran.stderr
    said, _, advice = ran.stdout.partition(" | ")
    assert message in said
    assert hint in advice


def test_int8_and_fused_operators_have_kernels_of_their_signatures() -> None:
    pytest.importorskip("triton")
    kernels = BACKENDS["triton"].load()
    fused = {n for n in ops.__all__ if n.startswith("int8_") or n.endswith(("_step", "_quantize"))}
    wanted = fused - OF_RULES_OF_CPU
    assert {f"ssmc::{name}" for name in wanted} <= set(kernels)
    for name in wanted:
        expected = inspect.signature(getattr(ops, name)).parameters
        given = inspect.signature(kernels[f"ssmc::{name}"]).parameters
        positional = [p for p in given.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert [(p.name, p.default) for p in positional] == [
            (p.name, p.default) for p in expected.values()
        ], name


@pytest.mark.parametrize("form", ["sequence", "last", "step"])
def test_attention_and_experts_have_kernels(form: Form) -> None:
    pytest.importorskip("triton")
    model = compile_tiny("jamba", "hadamard,percentile,quantise,kv-cache")
    lowered = lower(model.graph, "triton", form)
    plain = "plain torch: there is no kernel for ssmc::"
    reasons = {entry["reason"].removeprefix(plain) for entry in lowered.kept}
    layers = {node.meta.get("layer") for node in lowered.graph.nodes}
    found = sum((calls(lowered.graph, layer) for layer in layers), Counter())
    assert found["int8_attention"] == 1
    assert found["int8_expert_linear"] == 4
    assert found["cache_append_step"] == (4 if form == "step" else 0)
    assert not reasons & {"int8_attention", "int8_expert_linear", "cache_append"}


def test_tolerances_are_of_operators_that_have_kernels() -> None:
    known = {name for names in backend.KERNELS.values() for name in names}
    assert set(backend.TOLERANCES) <= known
    assert set(backend.INT4_TOLERANCES) <= known
    assert BACKENDS["triton"].tolerance("ssmc::int8_linear").error == 0
    assert BACKENDS["triton"].tolerance("ssmc::int8_linear", int4=True).error > 0


def test_what_runs_as_plain_torch_is_kept_with_a_reason() -> None:
    graph = compile_tiny("mamba", "hadamard,percentile,state").graph
    kernels = dict.fromkeys((f"ssmc::{n}" for n in calls(lower(graph, RULES).graph, 1)), abs)
    kernels |= {"ssmc::int8_embedding": abs, "ssmc::int8_linear": abs}
    kept = lower(graph, Backend("partial", kernels, RULES.rules, complete=True)).kept
    assert len(kept) == 2 * 3
    assert {entry["reason"] for entry in kept} == {"plain torch: there is no kernel for to_dtype"}
    del kernels["ssmc::hadamard_quantize"]
    kept = lower(graph, Backend("partial", kernels, RULES.rules, complete=True)).kept
    without = [entry["node"] for entry in kept if "hadamard_quantize" in entry["reason"]]
    assert without == [f"backbone_layers_{i}_mixer_out_proj_hadamard_q" for i in range(3)]


def test_a_layer_in_float_is_kept_once() -> None:
    graph = compile_tiny("mamba", "hadamard,percentile,quantise{head=false}").graph
    kept = lower(graph, Backend("none", complete=True)).kept
    (head,) = [entry for entry in kept if entry["node"] == "lm_head"]
    assert "not quantised" in head["reason"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "passes"),
    [
        ("mamba", "hadamard,percentile,quantise{weights=4,group=8}"),
        ("falcon", "hadamard,percentile"),
        ("mamba2-groups", "hadamard,percentile"),
        ("llama", "hadamard,percentile,quantise,kv-cache"),
    ],
)
def test_the_kernels_agree_with_the_simulation(architecture: str, passes: str) -> None:
    # Not with states of 16 bits: to those the interpreter truncates, where a GPU rounds.
    pytest.importorskip("triton")
    model = build(architecture, num_hidden_layers=1)
    compiled = ssmc.compile(model, passes=passes, calibration=tokens(4, 33))
    on_triton = CompiledModel(compiled.artefact, "triton", DEVICE)
    found = verify(on_triton, tokens(2, 6))
    assert [c for c in found if not c.agrees] == []
    assert {c.form for c in found} == {"sequence", "step"}
