"""The state of a scan in fewer bits between calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from core.tiny import KINDS, apply, context, error, graph
from frontend.models import tokens
from tiny import compile_tiny
from torch import Tensor

import ssmc
from ssmc.core import Graph, States
from ssmc.core.options import parse_passes
from ssmc.corpus import read_texts, token_windows
from ssmc.demo import evaluation_file
from ssmc.errors import UsageError
from ssmc.passes.state import DTYPE, State
from ssmc.quant.state import dequantize_state_tensor, quantize_state_tensor
from ssmc.recipe import make_recipe
from ssmc.runtime import CompiledModel
from ssmc.runtime.verify import verify

INTEGERS = ["bits=8", "bits=6,scales=tensor", "bits=4", "bits=4,scales=group,group=4"]
NOISY = "bits=4,rounding=stochastic"
FED = "bits=4,feedback=true"
FindPath = Callable[[str], Path]


def bytes_of(g: Graph, kind: str = "ssm") -> int:
    return sum(s.zeros(1).nbytes for s in g.states if kind in s.name)


def step_by_step(g: Graph, ids: Tensor) -> tuple[Tensor, States]:
    logits, states = [], None
    for token in ids.split(1, 1):
        result, states = g(token, states=states)
        logits.append(result)
    assert states is not None
    return torch.cat(logits, 1), states


@pytest.mark.parametrize("kind", KINDS)
def test_only_states_of_scans_are_rounded(kind: str) -> None:
    g = graph(kind)
    apply(g, "state")
    dtypes = {spec.name: spec.dtype for spec in g.states}
    assert {n for n, d in dtypes.items() if d == DTYPE} == {n for n in dtypes if "ssm" in n}
    assert [n.name for n in g.new_states] == [f"{name}_next" for name in dtypes]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [*INTEGERS, NOISY, FED])
def test_states_are_integers_and_scales(kind: str, options: str) -> None:
    before, g = graph(kind), graph(kind)
    record = apply(g, f"state{{{options}}}")["state"]
    assert len(record.matched) == 2
    assert [n.name for n in g.new_states] == [f"{spec.name}_next" for spec in g.states]
    dtypes = {spec.name: spec.dtype for spec in g.states}
    assert dtypes["l0_conv"] == torch.float32
    assert dtypes["l1_ssm"] == (torch.uint8 if "bits=4" in options else torch.int8)
    assert dtypes["l1_ssm_scale"] == torch.bfloat16
    integers = sum(s.zeros(1).nbytes for s in g.states if s.name.endswith("_ssm"))
    assert integers * (8 if "bits=4" in options else 4) == bytes_of(before)
    total = {x: sum(s.zeros(1).nbytes for s in x.states) for x in (before, g)}
    assert record.notes[-1] == (f"states take {total[g]} bytes a sequence, before {total[before]}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ["bits=16", *INTEGERS, NOISY, FED])
def test_a_call_from_fresh_states_is_unchanged(kind: str, options: str) -> None:
    plain, g = graph(kind), graph(kind)
    apply(g, f"state{{{options}}}")
    probe = context().probe or ()
    (expected, before), (result, after) = plain(*probe), g(*probe)
    assert torch.equal(result, expected)
    assert torch.equal(after["l0_conv"], before["l0_conv"])
    if options == "bits=16":
        assert torch.equal(after["l0_ssm"], before["l0_ssm"].to(DTYPE))


def _rounded(h: Tensor, options: str) -> Tensor:
    (p,) = parse_passes(f"state{{{options}}}")
    assert isinstance(p, State)
    if p.bits == 16:
        return h.to(DTYPE).float()
    form = (p.bits, p.scales, min(p.group, h.shape[-1]))
    return dequantize_state_tensor(*quantize_state_tensor(h, *form), p.scales)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ["bits=16", *INTEGERS])
def test_the_next_call_starts_from_the_rounded_state(kind: str, options: str) -> None:
    plain, g = graph(kind), graph(kind)
    apply(g, f"state{{{options}}}")
    (ids,) = context().probe or ()
    states = plain(ids)[1]
    rounded = {n: _rounded(s, options) if "ssm" in n else s for n, s in states.items()}
    expected = plain(ids, states=rounded)[0]
    result = g(ids, states=g(ids)[1])[0]
    assert torch.equal(result, expected)
    assert 0 < error(result, plain(ids, states=states)[0]) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_noise_goes_on_from_call_to_call_and_is_the_same_again(kind: str) -> None:
    (ids,) = context().probe or ()
    nearest, g, other = graph(kind), graph(kind), graph(kind)
    apply(nearest, "state{bits=4}")
    record = apply(g, f"state{{{NOISY}}}")["state"]
    logits, states = step_by_step(g, ids[:, :12])
    assert states["l0_ssm_count"].tolist() == [[12]] * len(ids)
    assert "l0_ssm_count" not in {s.name for s in nearest.states}
    assert record.diff is not None
    assert torch.equal(step_by_step(g, ids[:, :12])[0], logits)
    assert error(step_by_step(nearest, ids[:, :12])[0], logits) > 0
    seeded = context()
    seeded.seed = 5
    apply(other, f"state{{{NOISY}}}", seeded)
    assert error(step_by_step(other, ids[:, :12])[0], logits) > 0


def test_what_does_not_fit_is_left_alone_with_a_reason() -> None:
    g = graph("mamba")  # its state dimension is 8
    record = apply(g, "state{bits=4,scales=group,group=3}")["state"]
    assert record.matched == []
    assert {s["reason"] for s in record.skipped} == {
        "its state dimension 8 is no multiple of group=3"
    }
    odd = graph("mamba", state_size=7)
    notes = apply(odd, "state{bits=4}")["state"].notes
    assert "l0_ssm takes a byte a value: its state dimension 7 is odd" in notes
    assert next(s for s in odd.states if s.name == "l0_ssm").dtype == torch.int8


@pytest.mark.parametrize(
    "options",
    [{"bits": 5}, {"bits": 8, "group": 0}, {"rounding": "stochastic"}, {"feedback": True}],
)
def test_refused_options(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"state.*(bits|group|rounding)"):
        State(**options)  # type: ignore[arg-type]


def test_the_scheme_is_still_added() -> None:
    names = [p.name for p in make_recipe(passes="hadamard,percentile,state").plan()]
    assert "quantise" in names
    assert "state" in names


# -- a compiled model -------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["mamba", "mamba2"])
def compiled(request: pytest.FixtureRequest) -> CompiledModel:
    return compile_tiny(request.param, f"hadamard,percentile,state{{{NOISY}}}")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_lowered_and_simulated_agree(compiled: CompiledModel, backend: str) -> None:
    found = verify(CompiledModel(compiled.artefact, backend), tokens(2, 15))
    assert all(c.agrees for c in found)
    assert backend == "cpu" or all(c.differing == 0 and c.error == 0 for c in found)
    assert sum(c.operator == "ssmc::quantize_state" for c in found) == 3 * sum(
        s.name.endswith("_ssm") for s in compiled.graph.states
    )


def test_a_session_holds_integers_in_its_buffers(compiled: CompiledModel) -> None:
    ids, session = tokens(2, 9), compiled.session(2)
    addresses = {name: state.data_ptr() for name, state in session.states.items()}
    logits = torch.stack([session.step(token).clone() for token in ids.split(1, 1)], 1)
    expected, states = step_by_step(compiled.lowered.graph, ids)
    assert torch.equal(logits, expected)
    assert all(torch.equal(session.states[name], state) for name, state in states.items())
    assert {n: s.data_ptr() for n, s in session.states.items()} == addresses
    held = [state for name, state in session.states.items() if name.endswith("_ssm")]
    assert not any(state.is_floating_point() for state in held)


def test_an_artefact_keeps_it(compiled: CompiledModel, tmp_path: Path) -> None:
    loaded = ssmc.load(compiled.save(tmp_path / "out"))
    assert loaded.graph.states == compiled.graph.states
    ids = tokens(2, 6)
    assert torch.equal(loaded.generate(ids, 12), compiled.generate(ids, 12))


@pytest.mark.parametrize("passes", ["hadamard,percentile,quantise{weights=4,group=8}", "absmax"])
def test_with_other_schemes(passes: str) -> None:
    model = compile_tiny("mamba2", f"{passes},state{{bits=8}}")
    assert all(c.agrees for c in verify(model, tokens(2, 9)))


# -- trained models ---------------------------------------------------------------------------


def windows(model: ssmc.frontend.Model, count: int, length: int) -> Tensor:
    assert model.tokenizer is not None
    assert model.eos_token_id is not None
    texts = read_texts(evaluation_file())
    return token_windows(model.tokenizer, texts, model.eos_token_id, length, "demo")[:count]


def _compare_scales(name: str) -> dict[str, float]:
    """The mean relative error of the rows of all states of a trained model, by scales, 4 bits."""
    model = ssmc.load_model(name)
    _, states = ssmc.trace(model.module)(windows(model, 2, 128))
    found: dict[str, list[float]] = {"tensor": [], "group": [], "decoupled": []}
    for h in (state for key, state in states.items() if key.endswith("_ssm")):
        for scales, errors in found.items():
            errors.append(error(_rounded(h, f"bits=4,group=16,scales={scales}"), h))
    return {scales: sum(errors) / len(errors) for scales, errors in found.items()}


def test_decoupled_scales_suit_the_states_of_a_trained_model() -> None:
    errors = _compare_scales("demo")
    assert errors["decoupled"] < 0.5 * errors["tensor"], errors


@pytest.mark.parametrize("name", ["mamba-5m", "mamba2-6m"])
def test_decoupled_scales_suit_other_trained_models(name: str, shared_model: FindPath) -> None:
    errors = _compare_scales(str(shared_model(name)))
    assert errors["decoupled"] < 0.5 * errors["tensor"], errors
    if name == "mamba2-6m":
        assert errors["decoupled"] < errors["group"], errors


@pytest.fixture(scope="module")
def demo_errors() -> dict[str, float]:
    """The relative error of the demo's logits, token by token, that storing states adds."""
    model = ssmc.load_model("demo")
    plain, ids = ssmc.trace(model.module), windows(model, 2, 96)
    expected = step_by_step(plain, ids)[0]
    found = {}
    for options in ("bits=8", "bits=4", "bits=4,scales=tensor", NOISY, FED):
        g = plain.copy()
        apply(g, f"state{{{options}}}")
        found[options] = error(step_by_step(g, ids)[0], expected)
    return found


def test_bytes_of_a_trained_models_states() -> None:
    plain = ssmc.trace(ssmc.load_model("demo").module)
    shares = {}
    for options in ("bits=16", "bits=8", "bits=4", FED):
        g = plain.copy()
        apply(g, f"state{{{options}}}")
        shares[options] = bytes_of(plain) / bytes_of(g)
    assert shares["bits=16"] == 2
    assert shares["bits=8"] > 3.5
    assert shares["bits=4"] > 6.3
    assert shares[FED] == shares["bits=4"] / 2


def test_bits_scales_and_feedback_tell_in_the_logits(demo_errors: dict[str, float]) -> None:
    assert demo_errors["bits=8"] < 0.02, demo_errors
    assert demo_errors["bits=8"] < demo_errors["bits=4"] / 4, demo_errors
    assert demo_errors["bits=4"] < demo_errors["bits=4,scales=tensor"] / 2, demo_errors
    assert demo_errors[FED] < demo_errors["bits=4"] / 2, demo_errors
    assert demo_errors[NOISY] < 2 * demo_errors["bits=4"], demo_errors
