"""Sessions: token by token and in pieces as in one call, apart from one another, and afresh."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from frontend.models import tokens
from hypothesis import given
from hypothesis import strategies as st
from tiny import compile_tiny

import ssmc
from ssmc.core import Graph
from ssmc.errors import DeviceError, UsageError
from ssmc.runtime import CompiledModel
from ssmc.runtime.arguments import generate
from ssmc.runtime.session import Session, pieces


@pytest.fixture(scope="module", params=["mamba", "mamba2"])
def artefact(request: pytest.FixtureRequest) -> CompiledModel:
    return compile_tiny(request.param)


@pytest.fixture(scope="module", params=["reference", "cpu"])
def compiled(artefact: CompiledModel, request: pytest.FixtureRequest) -> CompiledModel:
    return CompiledModel(artefact.artefact, request.param, "cpu")


@pytest.mark.parametrize("execution", ["lowered", "simulated"])
@pytest.mark.parametrize("batch", [1, 3])
def test_steps_are_the_models_calls(compiled: CompiledModel, batch: int, execution: str) -> None:
    compiled.execution = execution  # type: ignore[assignment]
    ids, states = tokens(batch, 9), None
    session = compiled.session(batch)
    compiled.execution = "lowered"  # a session stays what it was opened as
    program = compiled.graph if execution == "simulated" else compiled.lowered.graph
    for token in ids.split(1, 1):
        logits, states = program(token, states=states)
        assert torch.equal(session.step(token), logits[:, -1])
    assert states is not None
    assert all(torch.equal(session.states[name], state) for name, state in states.items())


def test_a_prompt_is_one_call(compiled: CompiledModel) -> None:
    ids = tokens(2, 23)
    logits, states = compiled(ids)
    session = compiled.session(2)
    assert torch.equal(session.prefill(ids), logits[:, -1])
    assert all(torch.equal(session.states[name], state) for name, state in states.items())
    following = tokens(2, 1)
    assert torch.equal(session.step(following), compiled(following, states=states)[0][:, -1])


def test_scores_are_the_logits_of_every_position(compiled: CompiledModel) -> None:
    ids, following = tokens(2, 9), tokens(2, 4)
    logits, states = compiled(ids)
    session = compiled.session(2)
    assert torch.equal(session.score(ids), logits)
    assert torch.equal(session.score(following), compiled(following, states=states)[0])
    prompts = [ids[0, :4], ids[1]]
    each = compiled.session(2).score_each(prompts)
    for found, prompt in zip(each, prompts, strict=True):
        assert torch.equal(found, compiled(prompt[None])[0][0])


def test_a_reordered_session_goes_on_from_other_states(compiled: CompiledModel) -> None:
    ids, following = tokens(3, 9), tokens(3, 1)
    session, expected = compiled.session(3), compiled.session(3)
    rows = torch.tensor([2, 0, 0])
    session.prefill(ids)
    session.reorder(rows)
    expected.prefill(ids[rows])
    assert torch.equal(session.step(following), expected.step(following))


def test_a_prompt_in_pieces_is_the_whole(compiled: CompiledModel) -> None:
    ids = tokens(2, 53)
    session = compiled.session(2)
    for piece in ids.split([1, 2, 4, 8, 16, 22], 1):
        logits = session.prefill(piece)
    expected = compiled(ids)[0][:, -1]
    # Other chunks of a scan round otherwise in float32, which may move an 8-bit value by one.
    assert (logits - expected).norm() / expected.norm() < 5e-3
    short = compiled.session(2, prefill_piece=16).prefill(ids)
    assert (short - expected).norm() / expected.norm() < 5e-3


def test_a_reset_session_is_a_fresh_one(compiled: CompiledModel) -> None:
    ids, session = tokens(2, 7), compiled.session(2)
    first = session.prefill(ids).clone()
    assert not torch.equal(session.prefill(ids), first)
    session.reset()
    assert torch.equal(session.prefill(ids), first)


def test_sessions_share_nothing(compiled: CompiledModel) -> None:
    ids, other_ids = tokens(1, 6), tokens(1, 6)
    alone = compiled.session()
    expected = [alone.step(token).clone() for token in ids.split(1, 1)]
    session, other = compiled.session(), compiled.session()
    for token, other_token, logits in zip(
        ids.split(1, 1), other_ids.split(1, 1), expected, strict=True
    ):
        assert torch.equal(session.step(token), logits)
        other.step(other_token)


def test_a_call_leaves_the_states_it_is_given(compiled: CompiledModel) -> None:
    _, states = compiled(tokens(2, 5))
    before = {name: state.clone() for name, state in states.items()}
    compiled(tokens(2, 1), states=states)
    assert all(torch.equal(states[name], state) for name, state in before.items())


def test_generating_lends_a_session_and_takes_it_back(compiled: CompiledModel) -> None:
    ids = tokens(2, 5)
    expected = generate(compiled.lowered.graph, ids, 6)  # calls that carry states, no session
    assert torch.equal(compiled.generate(ids, 6), expected)
    with compiled.lend_session(2) as session:
        session.prefill(tokens(2, 3))
        assert torch.equal(compiled.generate(ids, 6), expected)
    assert torch.equal(compiled.generate(ids, 6), expected)
    with compiled.lend_session(2) as first:
        pass
    with compiled.lend_session(2) as again:
        assert again is first
    with compiled.lend_session(1) as other:
        assert other.batch == 1


@pytest.mark.parametrize("execution", ["lowered", "simulated"])
def test_prompts_of_any_lengths_are_what_they_are_alone(
    compiled: CompiledModel, execution: str
) -> None:
    compiled.execution = execution  # type: ignore[assignment]
    session, alone = compiled.session(3), [compiled.session() for _ in range(3)]
    compiled.execution = "lowered"
    for lengths in ((5, 23, 1), (2, 7, 7)):  # the second time from the states of the first
        prompts = [tokens(length) for length in lengths]
        logits = session.prefill_each(prompts)
        expected = [a.prefill(ids[None]) for a, ids in zip(alone, prompts, strict=True)]
        assert torch.equal(logits, torch.cat(expected))
        for name, state in session.states.items():
            assert torch.equal(state, torch.cat([a.states[name] for a in alone]))
    following = tokens(3, 1)
    found = session.step(following)
    expected = [a.step(ids[None]) for a, ids in zip(alone, following, strict=True)]
    assert torch.allclose(found, torch.cat(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.session(2).prefill_each([tokens(4)]), "1 prompts in a session of 2"),
        (lambda m: m.session(0), "a session of 0 sequences"),
        (lambda m: m.session(prefill_piece=48), "prefill_piece 48 is no power of two"),
        (lambda m: m.session(prefill_piece=8), "prefill_piece 8 is no power of two"),
        (lambda m: m.session(2).step(tokens(1, 1)), r"shape \[1, 1\] in a session of 2"),
        (lambda m: m.session(1).prefill(tokens(4)), r"shape \[4\] in a session of 1"),
        (lambda m: m.session(1).prefill(tokens(1, 0)), "the prompt is empty"),
    ],
)
def test_refuses(compiled: CompiledModel, call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(compiled)


def test_memory_that_runs_out_is_an_error_of_the_device(compiled: CompiledModel) -> None:
    def exhausted(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 1 GiB"
        )

    class Full(Graph):
        run = exhausted

    full = Full.__new__(Full)
    full.__dict__.update(compiled.lowered.graph.__dict__)
    with pytest.raises(DeviceError, match=r"Tried to allocate 2.00 GiB$") as caught:
        Session(lambda form: full, 1, torch.device("cpu")).step(tokens(1, 1))
    assert caught.value.exit_code == 4
    assert "smaller batch" in (caught.value.hint or "")


# -- pieces -------------------------------------------------------------------------------------


@given(st.integers(1, 20_000), st.sampled_from([16, 64, 2048]))
def test_pieces_add_up_to_the_prompt(length: int, largest: int) -> None:
    sizes = pieces(length, largest, 16)
    assert sum(sizes) == length
    assert sizes == sorted(sizes, reverse=True)
    assert set(sizes) <= {1} | {2**k for k in range(4, 12) if 2**k <= largest}
    halves = [size for size in sizes if 1 < size < largest]
    assert len(halves) == len(set(halves))
    assert sizes.count(1) < 16


def test_pieces_of_some_prompts() -> None:
    assert pieces(2048, 2048, 16) == [2048]
    assert pieces(4096 + 512 + 19, 2048, 16) == [2048, 2048, 512, 16, 1, 1, 1]
    assert pieces(3, 2048, 16) == [1, 1, 1]


# -- device and memory ----------------------------------------------------------------------------


def test_forms_share_their_tensors(tiny_artefact: Path) -> None:
    model = ssmc.load(tiny_artefact, device="cpu")
    assert model.device == torch.device("cpu")
    once = {t.data_ptr(): t.untyped_storage().nbytes() for t in model.graph.params().values()}
    own = model.weight_bytes() - sum(once.values())
    assert 0 <= own < 0.05 * model.weight_bytes()
    assert model.form("sequence") is model.lowered
    assert model.form("last") is model.form("last")
    ids = tokens(2, 11)
    assert torch.equal(model.form("last").graph(ids)[0][:, -1:], model(ids)[0][:, -1:])
    model.form("step")
    assert model.weight_bytes() - sum(once.values()) <= 3 * own


def test_auto_is_the_cpu_backend_on_a_cpu(tiny_artefact: Path) -> None:
    assert ssmc.load(tiny_artefact, device="cpu").backend == "cpu"
    assert ssmc.load(tiny_artefact, "reference", "cpu").backend == "reference"


def test_a_device_that_is_missing(tiny_artefact: Path) -> None:
    with pytest.raises(DeviceError, match="there is no device cuda:97"):
        ssmc.load(tiny_artefact, device="cuda:97")
    with pytest.raises(UsageError, match="unknown device 'gpu'"):
        ssmc.load(tiny_artefact, device="gpu")


def test_caches_get_more_room_when_a_session_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssmc.runtime.session.FIRST_ROOM", 8)
    compiled = compile_tiny("llama")
    session, (ids,) = compiled.session(2), (tokens(2, 30),)
    rooms, states, logits = [], None, []
    for part in ids.split([5, 1, 3, 1, 7, 1, 12], 1):
        whole, states = compiled(part, states=states)
        assert torch.equal(session.prefill(part), whole[:, -1])
        rooms.append(session.states["l0_k"].shape[1])
        logits.append(whole)
    assert rooms == [8, 8, 16, 16, 32, 32, 32]
    session.reset()
    assert not any(state.any() for state in session.states.values())
    assert torch.equal(session.prefill(ids[:, :5]), logits[0][:, -1])
    assert session.states["l0_k"].shape[1] == 32


def test_prompts_of_any_lengths_into_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssmc.runtime.session.FIRST_ROOM", 8)
    compiled = compile_tiny("jamba")
    session, alone = compiled.session(3), [compiled.session() for _ in range(3)]
    for lengths in ((5, 1, 3), (2, 9, 1), (20, 1, 4)):
        prompts = [tokens(length) for length in lengths]
        logits = session.prefill_each(prompts)
        expected = [a.prefill(ids[None]) for a, ids in zip(alone, prompts, strict=True)]
        assert torch.equal(logits, torch.cat(expected))
    assert session.states["position"].tolist() == [27, 11, 8]
    assert session.states["l2_k"].shape[1] == 34  # for what all calls together could need
    following = tokens(3, 1)
    found = session.step(following)
    expected = [a.step(ids[None]) for a, ids in zip(alone, following, strict=True)]
    assert torch.allclose(found, torch.cat(expected), rtol=1e-4, atol=1e-4)
