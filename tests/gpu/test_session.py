"""Sessions on a GPU: recorded calls are the calls, and sessions do not touch one another."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path

import pytest
import torch
from runtime.counter import Counter

import ssmc
from ssmc.core import Graph
from ssmc.evaluate import perplexity
from ssmc.lowering import Form
from ssmc.runtime import CompiledModel, Session
from ssmc.runtime.arguments import generate
from ssmc.runtime.capture import Recorder
from ssmc.runtime.sampling import Sampler, Sampling

pytestmark = pytest.mark.gpu
LENGTHS = (37, 1, 1, 16, 1, 300)
MOVED = 0.06
"""How far rounding alone moves logits of the demo: 0.053 by docs/performance.md."""


@pytest.fixture(scope="module")
def on_cpu(demo_folder: Path) -> CompiledModel:
    return ssmc.load(demo_folder, device="cpu")


@pytest.fixture(scope="module")
def compiled(demo_folder: Path) -> CompiledModel:
    return ssmc.load(demo_folder, device="cuda")


def tokens(model: CompiledModel, *shape: int) -> torch.Tensor:
    assert model.tokenizer is not None
    return torch.randint(0, model.tokenizer.get_vocab_size(), shape)


def unrecorded(model: CompiledModel, batch: int) -> Session:
    """A session that cuts prompts in the same way and records nothing."""
    session = model.session(batch)
    session._captured.clear()
    return session


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    value, expected = value.double().cpu(), expected.double().cpu()
    return ((value - expected).norm() / expected.norm()).item()


def test_runs_on_triton(compiled: CompiledModel) -> None:
    assert (compiled.backend, compiled.device.type) == ("triton", "cuda")


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_recorded_calls_are_the_calls(compiled: CompiledModel, batch: int) -> None:
    session, expected = compiled.session(batch), unrecorded(compiled, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in LENGTHS:
            ids = tokens(compiled, batch, length)
            assert torch.equal(session.prefill(ids), expected.prefill(ids))
            for name, state in expected.states.items():
                assert torch.equal(session.states[name], state)
    assert sorted(session._recordings) == [1, 16, 32, 256]


def test_prompts_of_any_lengths_are_what_they_are_alone(compiled: CompiledModel) -> None:
    session = compiled.session(3)
    prompts = [tokens(compiled, length) for length in (37, 300, 1)]
    logits = session.prefill_each(prompts)
    for row, ids in enumerate(prompts):
        alone = compiled.session()
        assert torch.equal(logits[row : row + 1], alone.prefill(ids[None]))
        for name, state in alone.states.items():
            assert torch.equal(session.states[name][row : row + 1], state)


def test_agrees_with_the_cpu(compiled: CompiledModel, on_cpu: CompiledModel) -> None:
    session, expected = compiled.session(2), on_cpu.session(2)
    for length in LENGTHS:
        ids = tokens(compiled, 2, length)
        assert relative(session.prefill(ids), expected.prefill(ids)) < MOVED


def test_every_value_is_written_anew(compiled: CompiledModel) -> None:
    session, ids = compiled.session(2), tokens(compiled, 2, 53)
    first = session.prefill(ids).clone()
    for _ in range(2):
        for state in session.states.values():
            state.fill_(77)
        session.reset()
        for recording in session._recordings.values():
            recording.logits.fill_(torch.nan)
        assert torch.equal(session.prefill(ids), first)


def test_sessions_share_nothing(compiled: CompiledModel) -> None:
    one, two, expected = compiled.session(), compiled.session(), unrecorded(compiled, 1)
    one.step(tokens(compiled, 1, 1))
    one.reset()
    for _ in range(4):
        ids = tokens(compiled, 1, 1)
        logits = one.step(ids)
        two.step(tokens(compiled, 1, 1))
        assert torch.equal(logits, expected.step(ids))


def test_greedy_tokens(compiled: CompiledModel, on_cpu: CompiledModel) -> None:
    ids = tokens(compiled, 2, 19)
    made = compiled.generate(ids, 40)
    assert made.device == ids.device
    assert torch.equal(made, compiled.generate(ids, 40))
    stepwise = generate(compiled.form("sequence").graph, ids.to(compiled.device), 1)
    assert torch.equal(stepwise[:, -1].cpu(), made[:, 19])
    logits, _ = on_cpu(made[:, :-1])
    agreement = (logits[:, 18:].argmax(-1) == made[:, 19:]).double().mean().item()
    assert agreement > 0.9


def test_a_token_is_chosen_without_waiting_for_the_device(
    compiled: CompiledModel,
) -> None:
    sampling = Sampling(0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
    logits = compiled.session(2).prefill(tokens(compiled, 2, 9))
    contexts = list(tokens(compiled, 2, 9).to(compiled.device))
    samplers = [Sampler(sampling, contexts, 4, compiled.device) for _ in range(2)]
    expected = [samplers[0].choose(logits) for _ in range(4)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [samplers[1].choose(logits) for _ in range(4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(torch.cat(found), torch.cat(expected))
    on_cpu = Sampler(sampling, [c.cpu() for c in contexts], 4, torch.device("cpu"))
    drawn = [on_cpu.choose(logits.cpu()) for _ in range(4)]
    assert torch.equal(torch.cat(found).cpu(), torch.cat(drawn))  # a seed means the same anywhere


def test_perplexity_in_both_modes(compiled: CompiledModel, on_cpu: CompiledModel) -> None:
    windows = tokens(compiled, 5, 65)
    expected = perplexity(on_cpu, windows).perplexity
    for mode in ("prefill", "recurrent"):
        found = perplexity(compiled, windows, mode, batch=2)  # type: ignore[arg-type]
        assert found.perplexity == pytest.approx(expected, rel=1e-2)


def test_weights_are_in_memory_once(demo_folder: Path) -> None:
    gc.collect()  # sessions of other tests
    before = torch.cuda.memory_allocated()
    model = ssmc.load(demo_folder, device="cuda")
    for form in ("last", "step"):
        model.form(form)  # type: ignore[arg-type]
    used = torch.cuda.memory_allocated() - before
    tensors = sum(len(model.form(f).graph.params()) for f in ("last", "step"))  # type: ignore[arg-type]
    assert model.weight_bytes() <= used <= model.weight_bytes() + 512 * 3 * tensors


@pytest.mark.parametrize("fails", ["last", "step"])
def test_what_waits_for_the_gpu_is_not_recorded(compiled: CompiledModel, fails: Form) -> None:
    programs: dict[Form, Counter] = {f: Counter(f, f == fails) for f in ("last", "step")}

    def program(form: Form) -> Graph:
        return programs[form]  # type: ignore[return-value]

    session = Session(program, 2, compiled.device, recorder=Recorder)
    ids = torch.ones(2, 16 + 32 + 1, dtype=torch.int64)
    stream = torch.cuda.current_stream()
    with pytest.warns(RuntimeWarning, match="cannot be recorded"):
        assert session.prefill(ids).tolist() == [[49, 1], [49, 1]]
    assert torch.cuda.current_stream() == stream
    assert session.prefill(ids).tolist() == [[98, 1], [98, 1]]
    assert torch.rand(2, device=compiled.device).shape == (2,)  # refused after a failed recording
    assert compiled.generate(tokens(compiled, 1, 20), 3).shape == (1, 23)  # others still record
