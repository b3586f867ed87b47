"""Verification names the kernel that is wrong, and looks at every integer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from frontend.models import tokens
from tiny import compile_tiny

import ssmc
from ssmc.lowering import BACKENDS, lower
from ssmc.lowering.backends import cpu
from ssmc.runtime import CompiledModel
from ssmc.runtime.verify import QUANTIZE, verify

Kernel = Callable[..., Any]


@pytest.fixture(scope="module", params=["mamba", "mamba2"])
def compiled(request: pytest.FixtureRequest) -> CompiledModel:
    return compile_tiny(request.param)


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_agrees_bit_for_bit(compiled: CompiledModel, backend: str) -> None:
    model = CompiledModel(compiled.artefact, backend)
    found = verify(model, tokens(2, 15))
    assert all(c.agrees and c.differing == 0 and c.error == 0 for c in found)


def test_every_fused_and_every_quantize_call_is_compared(compiled: CompiledModel) -> None:
    wanted = set(compiled.lowered.fused)
    wanted |= {n.name for name in QUANTIZE for n in compiled.graph.calls(name)}
    found = verify(compiled, tokens(2, 15))
    assert {c.node for c in found} == wanted
    assert len(found) == 2 * len(wanted)  # once from fresh states, once from carried ones
    assert all(c.values > 0 for c in found)
    assert {c.operator.partition("::")[0] for c in found} == {"ssmc"}


def test_one_token_is_enough(compiled: CompiledModel) -> None:
    assert all(c.agrees for c in verify(compiled, tokens(2, 1)))


def with_kernel(compiled: CompiledModel, operator: str, kernel: Kernel) -> CompiledModel:
    """The model on a backend that has this kernel; `lowered` is what CompiledModel would make."""
    model = CompiledModel(compiled.artefact, "cpu")
    backend = replace(cpu.CPU, kernels={**cpu.CPU.kernels, operator: kernel})
    lowered = lower(model.graph, "cpu")
    for node in lowered.graph.nodes:
        if node.target is cpu.CPU.kernels.get(operator):
            node.target = kernel
    lowered.graph.module.recompile()
    lowered.backend = backend
    model.lowered = lowered
    return model


def test_a_wrong_product_is_named_alone(compiled: CompiledModel) -> None:
    calls = []

    def wrong(x_q: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(None)
        off = 1e-4 if len(calls) == 2 else 0.0
        return cpu.int8_linear(x_q, *rest) + off

    model = with_kernel(compiled, "ssmc::int8_linear", wrong)
    different = [c for c in verify(model, tokens(2, 1)) if not c.agrees]
    linears = [n.name for n in model.graph.calls("ssmc::linear")]
    assert [(c.node, c.operator) for c in different] == [(linears[1], "ssmc::int8_linear")]
    assert 0 < different[0].error < 1e-2


@pytest.mark.parametrize("part", ["output", "new state"])
def test_both_results_of_a_convolution_are_compared(compiled: CompiledModel, part: str) -> None:
    def wrong(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        y, state = cpu.int8_causal_conv1d(*args)
        return (y * (1 + 1e-5), state) if part == "output" else (y, state + 1)

    model = with_kernel(compiled, "ssmc::int8_causal_conv1d", wrong)
    different = [c for c in verify(model, tokens(2, 1)) if not c.agrees]
    assert {c.operator for c in different} == {"ssmc::int8_causal_conv1d"}
    assert len(different) == 3
    assert all((c.differing > 0) == (part == "new state") for c in different)


def test_a_kernel_that_forgets_its_state_is_found(compiled: CompiledModel) -> None:
    def forgets(x_q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *front, state, activation = rest
        return cpu.int8_causal_conv1d(x_q, *front, torch.zeros_like(state), activation)

    model = with_kernel(compiled, "ssmc::int8_causal_conv1d", forgets)
    different = [c for c in verify(model, tokens(2, 16)) if not c.agrees]
    assert {c.operator for c in different} == {"ssmc::int8_causal_conv1d"}


def test_a_tolerance_is_for_floats_only(compiled: CompiledModel) -> None:
    def rough(x_q: torch.Tensor, *rest: Any) -> torch.Tensor:
        return cpu.int8_linear(x_q, *rest) * (1 + 1e-6)

    model = with_kernel(compiled, "ssmc::int8_linear", rough)
    assert any(not c.agrees for c in verify(model, tokens(2, 9)))
    model.lowered.backend = replace(model.lowered.backend, tolerance=1e-5)
    assert all(c.agrees for c in verify(model, tokens(2, 9)))


def test_a_module_without_states_is_verified(own_module: torch.nn.Module) -> None:
    x, mask = torch.randn(2, 9, 12), torch.rand(2, 9, 12)
    compiled = ssmc.compile(own_module, (x, mask), calibration=[(x, mask)], passes="absmax")
    found = verify(compiled, x, mask)
    assert found
    assert all(c.agrees for c in found)
