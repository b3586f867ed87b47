"""Steps from a tape are the steps themselves, with kernels and with plain torch in between."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from frontend.models import tokens
from tiny import compile_tiny

from ssmc.core.state import fresh_states
from ssmc.lowering.backends import cpu
from ssmc.runtime import CompiledModel
from ssmc.runtime.replay import TapeRecorder
from ssmc.runtime.session import FIRST_ROOM
from ssmc.runtime.verify import verify

pytest.importorskip("numba")

PASSES = {
    "mamba": "hadamard,percentile",
    "mamba2-groups": "hadamard,percentile,quantise,state{bits=8}",
    "jamba": "hadamard,percentile,quantise,kv-cache",
}


@pytest.fixture(scope="module", params=list(PASSES))
def compiled(request: pytest.FixtureRequest) -> CompiledModel:
    return compile_tiny(request.param, PASSES[request.param])


def test_every_call_agrees_with_the_simulation(compiled: CompiledModel) -> None:
    found = verify(compiled, tokens(2, 12))
    assert [c for c in found if not c.agrees] == []
    assert {c.form for c in found} == {"sequence", "step"}


@pytest.mark.parametrize("batch", [1, 3])
def test_steps_from_a_tape(compiled: CompiledModel, batch: int) -> None:
    session = compiled.session(batch)
    prompt = tokens(batch, 9)
    session.prefill(prompt)
    program, states = compiled.form("step").graph, compiled(prompt)[1]
    for token in tokens(batch, 4).split(1, 1):
        logits, states = program(token, states=states)
        assert torch.equal(session.step(token), logits[:, -1])
    assert len(session._recordings) == 1


@pytest.mark.parametrize("architecture", ["jamba", "llama"])
@pytest.mark.parametrize("passes", ["hadamard,percentile", PASSES["jamba"]])
def test_steps_of_attention_and_experts_are_one_list_of_kernels(
    architecture: str, passes: str
) -> None:
    session = compile_tiny(architecture, passes).session(2)
    session.step(tokens(2, 1))
    (recording,) = session._recordings.values()
    assert [type(part) for part in recording.tape.parts] == [list]  # type: ignore[union-attr]


def test_a_step_needs_no_compiler_of_torch(tmp_path: Path) -> None:
    compile_tiny("jamba", PASSES["jamba"]).save(tmp_path / "out")
    code = f"""
import sys, torch, ssmc.runtime
session = ssmc.runtime.load({str(tmp_path / "out")!r}, "cpu", "cpu").session(1)
session.prefill(torch.ones(1, 5, dtype=torch.int64))
session.step(torch.ones(1, 1, dtype=torch.int64))
print(sorted({{"sympy", "torch._dynamo", "transformers", "triton"}} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == "[]\n", ran.stderr


def test_tapes_are_recorded_anew_when_caches_move() -> None:
    model = compile_tiny("jamba", PASSES["jamba"])
    session, whole = model.session(1), tokens(1, FIRST_ROOM + 2)
    session.prefill(whole[:, : FIRST_ROOM - 1])
    session.step(whole[:, FIRST_ROOM - 1 : FIRST_ROOM])  # the last row of the first room
    session.step(whole[:, FIRST_ROOM : FIRST_ROOM + 1])
    logits = session.step(whole[:, FIRST_ROOM + 1 :])
    torch.testing.assert_close(logits, model(whole)[0][:, -1], rtol=0, atol=1e-4)


def test_recording_leaves_the_states_alone(compiled: CompiledModel) -> None:
    states = fresh_states(compiled.graph.states, 2, "cpu", 8)
    states = {name: torch.ones_like(state) for name, state in states.items()}
    lowered = compiled.form("step").graph
    given = {s.name: states[s.name].to(s.dtype) for s in lowered.states}
    before = {name: state.clone() for name, state in given.items()}
    TapeRecorder(given, torch.device("cpu")).record(lowered, (2, 1))
    assert all(torch.equal(given[name], before[name]) for name in before)


def test_sessions_share_nothing(compiled: CompiledModel) -> None:
    one, two, expected = (compiled.session(1) for _ in range(3))
    ids = tokens(1, 6)
    for token in ids.split(1, 1):
        logits = one.step(token).clone()
        two.step(tokens(1, 1))
        assert torch.equal(logits, expected.step(token))


def test_it_is_what_the_backend_is_where_numba_is() -> None:
    assert cpu.CPU is cpu.COMPILED
    assert not cpu.PLAIN.can_record(torch.device("cpu"))
