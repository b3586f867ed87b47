"""Recorded calls, with CUDA graphs emulated on the CPU: they replay what the calls would do."""

from __future__ import annotations

import warnings

import pytest
import torch
from frontend.models import tokens
from tiny import compile_tiny

from ssmc.core import Graph, States, StateSpec
from ssmc.core.state import OPEN, POSITION
from ssmc.errors import DeviceError
from ssmc.lowering import Form
from ssmc.runtime import CompiledModel
from ssmc.runtime.capture import Recorder
from ssmc.runtime.session import Session

from .counter import Counter
from .emulated_cuda import WAITS, emulate_cuda

CPU = torch.device("cpu")
LENGTHS = (37, 1, 1, 16, 1, 53)


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate_cuda(monkeypatch)


@pytest.fixture(scope="module", params=["mamba", "mamba2"])
def compiled(request: pytest.FixtureRequest) -> CompiledModel:
    return CompiledModel(compile_tiny(request.param).artefact, "reference")


def recorded(model: CompiledModel, batch: int) -> Session:
    return Session(
        lambda form: model.form(form).graph, batch, CPU, recorder=Recorder, prefill_piece=32
    )


def in_pieces(model: CompiledModel, batch: int) -> Session:
    """A session that cuts prompts in the same way and records nothing."""
    session = recorded(model, batch)
    session._captured.clear()
    return session


@pytest.mark.parametrize("batch", [1, 2])
def test_recorded_calls_are_the_calls(compiled: CompiledModel, batch: int) -> None:
    session, expected = recorded(compiled, batch), in_pieces(compiled, batch)
    for length in LENGTHS:
        ids = tokens(batch, length)
        assert torch.equal(session.prefill(ids), expected.prefill(ids))
        for name, state in expected.states.items():
            assert torch.equal(session.states[name], state)
    assert sorted(session._recordings) == [1, 16, 32]
    assert session._recordings[16].graph.replays == 2  # type: ignore[attr-defined]


def test_again_after_a_reset(compiled: CompiledModel) -> None:
    session, ids = recorded(compiled, 2), tokens(2, 21)
    first, states = session.prefill(ids).clone(), dict(session.states)
    session.reset()
    for state in session.states.values():
        assert not state.any()
    assert torch.equal(session.prefill(ids), first)
    assert all(session.states[name] is state for name, state in states.items())


def test_one_set_of_recordings_serves_prompts_of_any_lengths(compiled: CompiledModel) -> None:
    session = recorded(compiled, 3)
    prompts = [tokens(length) for length in (37, 3, 21)]
    alone = [in_pieces(compiled, 1) for _ in prompts]
    logits = session.prefill_each(prompts)
    expected = [a.prefill(ids[None]) for a, ids in zip(alone, prompts, strict=True)]
    assert torch.equal(logits, torch.cat(expected))
    for name, state in session.states.items():
        assert torch.equal(state, torch.cat([a.states[name] for a in alone]))
    assert session._single is not None
    assert sorted(session._single._recordings) == [1, 16, 32]
    session.step(tokens(3, 1))
    assert sorted(session._recordings) == [1]


def test_sessions_share_nothing(compiled: CompiledModel) -> None:
    one, two, expected = (make(compiled, 1) for make in (recorded, recorded, in_pieces))
    for _ in range(4):
        ids = tokens(1, 1)
        two.step(tokens(1, 1))
        assert torch.equal(one.step(ids), expected.step(ids))


def counting(fails: Form | None = None) -> tuple[Session, dict[Form, Counter]]:
    programs: dict[Form, Counter] = {f: Counter(f, f == fails) for f in ("last", "step")}

    def program(form: Form) -> Graph:
        return programs[form]  # type: ignore[return-value]

    return Session(program, 2, CPU, recorder=Recorder), programs


def test_states_in_place_and_in_other_buffers() -> None:
    session, programs = counting()
    prompt = torch.ones(2, 33, dtype=torch.int64)
    prompt[:, -1] = 5
    assert session.prefill(prompt).tolist() == [[37, 1], [37, 1]]  # 32 tokens, then the last
    assert session.step(torch.tensor([[2], [3]])).tolist() == [[39, 5], [40, 5]]
    assert session.step(torch.tensor([[4], [4]])).tolist() == [[43, 2], [44, 3]]
    assert session.states["sum"].tolist() == [[43], [44]]
    assert {form: p.calls for form, p in programs.items()} == {"last": 2, "step": 2}


@pytest.mark.parametrize("form", ["last", "step"])
def test_what_cannot_be_recorded_runs_as_it_is(form: Form) -> None:
    session, programs = counting(fails=form)
    ids = torch.ones(2, 16 + 32 + 1, dtype=torch.int64)
    with pytest.warns(RuntimeWarning, match="cannot be recorded") as caught:
        assert session.prefill(ids).tolist() == [[49, 1], [49, 1]]
    assert len(caught) == 1
    assert WAITS in str(caught[0].message)
    assert "and more lines" not in str(caught[0].message)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert session.prefill(ids).tolist() == [[98, 1], [98, 1]]
    assert programs["step" if form == "last" else "last"].calls in (2, 4)  # recorded once a length


def spoil(monkeypatch: pytest.MonkeyPatch, error: Exception, first: int) -> None:
    """Let the calls of a counter fail, from the one with this number on."""
    run = Counter.run

    def spoilt(self: Counter, ids: torch.Tensor, states: States) -> tuple[torch.Tensor, States]:
        if self.calls >= first:
            raise error
        return run(self, ids, states)

    monkeypatch.setattr(Counter, "run", spoilt)


def test_memory_that_runs_out_while_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "CUDA out of memory. Tried to allocate 1 GiB. GPU 0 has"
    spoil(monkeypatch, torch.OutOfMemoryError(message), 1)
    with pytest.raises(DeviceError, match=r"Tried to allocate 1 GiB$"):
        counting()[0].step(torch.ones(2, 1, dtype=torch.int64))


def test_an_error_of_the_call_itself_is_not_one_of_recording(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch, RuntimeError("wrong shapes"), 0)
    with pytest.raises(RuntimeError, match="wrong shapes"):
        counting()[0].step(torch.ones(2, 1, dtype=torch.int64))


class Diary:
    """Keeps every token in a cache; its logits are the sum of those kept."""

    states = (StateSpec(POSITION, (), torch.int64), StateSpec("rows", (OPEN,), torch.int64))

    def run(self, ids: torch.Tensor, states: States) -> tuple[torch.Tensor, States]:
        positions = states[POSITION].unsqueeze(1) + torch.arange(ids.shape[1])
        rows = states["rows"].index_put((torch.arange(len(ids)).unsqueeze(1), positions), ids)
        new = {POSITION: states[POSITION] + ids.shape[1], "rows": rows}
        return rows.sum(1)[:, None, None], new


def test_calls_are_recorded_anew_when_caches_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssmc.runtime.session.FIRST_ROOM", 32)
    session = Session(lambda form: Diary(), 2, CPU, recorder=Recorder)  # type: ignore[arg-type, return-value]
    whole = torch.zeros(2, 0, dtype=torch.int64)
    for length, recorded in ((16, [16]), (1, [1, 16]), (16, [16]), (1, [1, 16]), (1, [1, 16])):
        ids = tokens(2, length)
        whole = torch.cat([whole, ids], 1)
        assert torch.equal(session.prefill(ids), whole.sum(1, keepdim=True))
        assert sorted(session._recordings) == recorded
        assert torch.equal(session.states["rows"][:, : whole.shape[1]], whole)
    assert session.states["rows"].shape[1] == 64
