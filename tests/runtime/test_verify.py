"""Verification names the kernel that is wrong, and looks at every integer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from frontend.models import tokens
from lowering.rules import RULES
from tiny import compile_tiny

import ssmc
from ssmc.core.dialect import target_name
from ssmc.lowering import BACKENDS, Backend, Form, Tolerance
from ssmc.lowering.backends import plain
from ssmc.lowering.backends.reference import REFERENCE
from ssmc.ops import rms_norm
from ssmc.runtime import CompiledModel
from ssmc.runtime.verify import QUANTIZE, Comparison, verify

Kernel = Callable[..., Any]


@pytest.fixture(scope="module", params=["mamba", "mamba2"])
def compiled(request: pytest.FixtureRequest) -> CompiledModel:
    return CompiledModel(compile_tiny(request.param).artefact, "reference")


@pytest.fixture
def on(compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CompiledModel]:
    """`on(backend)`: the model on a backend that need not be a known one."""

    def run_on(backend: Backend) -> CompiledModel:
        monkeypatch.setitem(BACKENDS, backend.name, backend)
        return CompiledModel(compiled.artefact, backend.name)

    return run_on


def with_kernel(operator: str, kernel: Kernel, base: Backend = plain.PLAIN) -> Backend:
    """A backend like `base` that has this kernel."""
    return replace(base, name="changed", kernels={**base.kernels, operator: kernel})


@pytest.mark.parametrize("backend", [REFERENCE, plain.PLAIN])
def test_everything_agrees_bit_for_bit(on: Callable[..., CompiledModel], backend: Backend) -> None:
    found = verify(on(backend), tokens(2, 15))
    assert all(c.agrees and c.differing == 0 and c.error == 0 for c in found)


def test_every_fused_and_every_quantize_call_is_compared(compiled: CompiledModel) -> None:
    wanted = set(compiled.lowered.fused)
    wanted |= {n.name for name in QUANTIZE for n in compiled.graph.calls(name)}
    found = verify(compiled, tokens(2, 15))
    assert {c.node for c in found} == wanted
    # From fresh states, from carried ones, and one position in the form for steps.
    assert len(found) == 3 * len(wanted)
    assert [c.form for c in found] == ["sequence"] * 2 * len(wanted) + ["step"] * len(wanted)
    assert all(c.values > 0 for c in found)
    assert {c.operator.partition("::")[0] for c in found} == {"ssmc"}


def test_fused_calls_of_several_results_are_compared_by_value(
    on: Callable[..., CompiledModel],
) -> None:
    model = on(RULES)
    found = verify(model, tokens(2, 15))
    assert all(c.agrees and c.differing == 0 and c.error == 0 for c in found)
    forms: tuple[Form, ...] = ("sequence", "step")
    for form in forms:
        lowered = model.form(form)
        compared = [c for c in found if c.form == form]
        fused = [lowered.graph.node(name) for name in lowered.fused]
        assert {c.operator for c in compared} == {target_name(n.target) for n in fused}
        held = {state.args[0].name for state in lowered.graph.new_states} | {
            state.name for state in lowered.graph.new_states
        }
        assert len({c.node for c in compared} & held) == len(model.graph.states)


def test_one_token_is_enough(compiled: CompiledModel) -> None:
    assert all(c.agrees for c in verify(compiled, tokens(2, 1)))


@pytest.mark.parametrize("length", [2, 3, 4])
def test_few_tokens_end_with_a_step(compiled: CompiledModel, length: int) -> None:
    found = verify(compiled, tokens(2, length))
    assert {c.form for c in found} == {"sequence", "step"}
    assert all(c.agrees for c in found)


def test_steps_may_overwrite_their_states(
    compiled: CompiledModel, on: Callable[..., CompiledModel]
) -> None:
    operator = "ssmc::selective_scan_step"
    if not compiled.graph.calls("ssmc::selective_scan"):
        operator = "ssmc::ssd_scan_step"
    reference = getattr(torch.ops.ssmc, operator.partition("::")[2]).default
    places = [argument.name for argument in reference._schema.arguments]

    def in_place(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        state = args[places.index("state")]
        y, new = reference(*args)
        return y, state.copy_(new)

    model = on(with_kernel(operator, in_place, RULES))
    ids = tokens(2, 9)
    assert all(c.agrees for c in verify(model, ids))
    assert all(c.agrees for c in verify(model, ids))


def test_a_wrong_product_is_named_alone(on: Callable[..., CompiledModel]) -> None:
    calls = []

    def wrong(x_q: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(None)
        off = 1e-4 if len(calls) == 2 else 0.0
        return plain.int8_linear(x_q, *rest) + off

    model = on(with_kernel("ssmc::int8_linear", wrong))
    different = [c for c in verify(model, tokens(2, 1)) if not c.agrees]
    linears = [n.name for n in model.graph.calls("ssmc::linear")]
    assert [(c.node, c.operator) for c in different] == [(linears[1], "ssmc::int8_linear")]
    assert 0 < different[0].error < 1e-2


def test_kernels_of_operators_that_stay_in_float_are_compared(
    on: Callable[..., CompiledModel],
) -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-5) -> Any:
        return rms_norm(x, weight, eps) * (1 + 1e-5)

    model = on(with_kernel("ssmc::rms_norm", wrong))
    norms = [n.name for n in model.graph.calls("ssmc::rms_norm")]
    different = [c for c in verify(model, tokens(2, 1)) if not c.agrees]
    assert [c.node for c in different] == norms
    assert {c.operator for c in different} == {"ssmc::rms_norm"}


@pytest.mark.parametrize("part", ["output", "new state"])
def test_both_results_of_a_convolution_are_compared(
    on: Callable[..., CompiledModel], part: str
) -> None:
    def wrong(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        y, state = plain.int8_causal_conv1d(*args)
        return (y * (1 + 1e-5), state) if part == "output" else (y, state + 1)

    model = on(with_kernel("ssmc::int8_causal_conv1d", wrong))
    different = [c for c in verify(model, tokens(2, 1)) if not c.agrees]
    assert {c.operator for c in different} == {"ssmc::int8_causal_conv1d"}
    assert len(different) == 3
    assert all((c.differing > 0) == (part == "new state") for c in different)
    assert all(c.largest >= (part == "new state") for c in different)


def test_a_kernel_that_forgets_its_state_is_found(on: Callable[..., CompiledModel]) -> None:
    def forgets(x_q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *front, state, activation = rest
        return plain.int8_causal_conv1d(x_q, *front, torch.zeros_like(state), activation)

    model = on(with_kernel("ssmc::int8_causal_conv1d", forgets))
    different = [c for c in verify(model, tokens(2, 16)) if not c.agrees]
    assert {c.operator for c in different} == {"ssmc::int8_causal_conv1d"}


def test_a_tolerance_is_for_the_operator_it_is_stated_for(
    on: Callable[..., CompiledModel],
) -> None:
    def rough(x_q: torch.Tensor, *rest: Any) -> torch.Tensor:
        return plain.int8_linear(x_q, *rest) * (1 + 1e-6)

    backend = with_kernel("ssmc::int8_linear", rough)
    assert any(not c.agrees for c in verify(on(backend), tokens(2, 9)))
    within = {"ssmc::int8_linear": Tolerance(1e-5)}
    assert all(c.agrees for c in verify(on(replace(backend, tolerances=within)), tokens(2, 9)))
    elsewhere = {"ssmc::int8_embedding": Tolerance(1e-5)}
    found = verify(on(replace(backend, tolerances=elsewhere)), tokens(2, 9))
    assert {c.operator for c in found if not c.agrees} == {"ssmc::int8_linear"}


@pytest.mark.parametrize(
    ("differing", "largest", "error", "agrees"),
    [
        (0, 0, 0.0, True),
        (0, 0, 0.1, True),
        (0, 0, 0.11, False),
        (0, 0, float("nan"), False),
        (10, 1, 0.0, True),
        (11, 1, 0.0, False),
        (1, 2, 0.0, False),
    ],
)
def test_the_rule_of_agreement(differing: int, largest: int, error: float, agrees: bool) -> None:
    measured = (1000, differing, largest, error)
    found = Comparison("y", "ssmc::quantize", "step", *measured, tolerance=0.1, flips=0.01)
    assert found.agrees is agrees


def test_a_module_without_states_is_verified(own_module: torch.nn.Module) -> None:
    x, mask = torch.randn(2, 9, 12), torch.rand(2, 9, 12)
    compiled = ssmc.compile(own_module, (x, mask), calibration=[(x, mask)], passes="absmax")
    found = verify(compiled, x, mask)
    assert found
    assert all(c.agrees for c in found)
