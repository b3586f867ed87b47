"""Subjects side by side: checked first and last, timed in turns, reported."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from tiny import compile_tiny
from torch import Tensor

from ssmc.bench import measure as measuring
from ssmc.bench.baselines import Transformers, find_dtype, mamba_ssm
from ssmc.bench.check import Oracle
from ssmc.bench.measure import Plan, Workload, measure
from ssmc.bench.sizes import SIZES, Size
from ssmc.bench.subjects import Compiled, Runner, Traced
from ssmc.errors import DeviceError, UsageError
from ssmc.frontend import trace

CPU = torch.device("cpu")


@dataclass
class Counting:
    """Logits that tell how many tokens came, and a log of who was called."""

    name: str
    log: list[str] = field(default_factory=list)
    weight_bytes: int = 8
    vocabulary: int = 11

    def open(self, batch: int) -> Runner:
        return _CountingRunner(self)


class _CountingRunner:
    def __init__(self, subject: Counting) -> None:
        self.subject, self.seen = subject, 0

    def prefill(self, ids: Tensor) -> Tensor:
        assert int(ids.max()) < self.subject.vocabulary
        self.subject.log.append(self.subject.name)
        self.seen += ids.shape[1]
        return torch.full((len(ids), self.subject.vocabulary), float(self.seen))

    step = prefill

    def reset(self) -> None:
        self.seen = 0


def test_workloads_of_a_plan() -> None:
    plan = Plan(ttft=(7, 9), tpot=True, ttlt=((7, 3),), n=20)
    found = plan.workloads(2)
    assert [(w.kind, w.batch, w.prompt, w.tokens) for w in found] == [
        ("ttft", 2, 7, 1),
        ("ttft", 2, 9, 1),
        ("tpot", 2, measuring.TPOT_PROMPT, 1),
        ("ttlt", 2, 7, 3),
    ]
    assert [plan.runs(w) for w in found] == [20, 20, 20, 3]


def test_every_subject_at_every_workload_in_turns() -> None:
    log: list[str] = []
    subjects = [Counting("a", log), Counting("b", log)]
    seen: list[tuple[int, int]] = []
    plan = Plan(ttft=(4,), tpot=True, ttlt=((4, 5),), batches=(1, 3), n=12)
    result = measure(subjects, plan, CPU, lambda done, total: seen.append((done, total)))
    assert [(m.target, m.workload) for m in result.measurements] == [
        (name, workload) for batch in (1, 3) for workload in plan.workloads(batch) for name in "ab"
    ]
    assert {m.timing.n for m in result.measurements} == {12, 3}
    assert seen == [(i, 6) for i in range(7)]
    turns = "".join(log).replace("a", " a").split("b")  # neither waits for the other to end
    assert len(turns) > 10


def test_time_to_the_last_token_generates_all_tokens() -> None:
    subject = Counting("a")
    measure([subject], Plan(ttft=(), tpot=False, ttlt=((4, 5),), n=1), CPU)
    assert len(subject.log) == 5 * (1 + 3)  # a warm-up and three runs of a prompt and four steps


class _Spoilt:
    """A runner that is right for its first calls, then off by a factor."""

    def __init__(self, runner: Runner, good: int, factor: float) -> None:
        self.runner, self.left, self.factor = runner, good, factor

    def prefill(self, ids: Tensor) -> Tensor:
        self.left -= 1
        logits = self.runner.prefill(ids)
        return logits if self.left >= 0 else self.factor * logits

    step = prefill

    def reset(self) -> None:
        self.runner.reset()


@pytest.mark.parametrize(("good", "timed"), [(0, 0), (10, 0), (10**6, 1)])
@pytest.mark.parametrize("factor", [1.5, float("nan")])
def test_what_is_wrong_is_not_reported(
    good: int, timed: int, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Compiled("tiny", compile_tiny())
    opened = Compiled.open
    monkeypatch.setattr(
        Compiled,
        "open",
        lambda self, batch: (
            opened(self, batch)
            if "reference" in self.name
            else _Spoilt(opened(self, batch), good, factor)
        ),
    )
    result = measure([subject], Plan(ttft=(5,), tpot=False, batches=(2,), n=3), CPU)
    assert len(result.measurements) == timed
    expected = [] if timed else [("tiny", Workload("ttft", 2, 5))]
    assert [(target, workload) for target, workload, _ in result.wrong] == expected
    assert all(error > 0.3 for *_, error in result.wrong)


def test_a_compiled_model_is_its_reference() -> None:
    subject = Compiled("tiny", compile_tiny("mamba2"))
    oracle = Oracle(subject.reference(), CPU)
    ids, logits = oracle.answer(6)
    assert (ids.shape, logits.shape) == ((1, 10), (5, subject.vocabulary))
    assert oracle.answer(6)[0] is ids
    assert oracle.error(subject.open(3), 3, 6) == 0
    other = Compiled("other", compile_tiny("mamba2", passes="absmax"))
    assert 0 < oracle.error(other.open(1), 1, 6) < 0.5


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_a_transformers_model_decodes_as_it_is_traced(layer: str) -> None:
    module = Size("small", layer, 64, 2).module("cpu")  # type: ignore[arg-type]
    traced = Traced("traced", trace(module), CPU)
    baseline = Transformers(module, CPU, torch.float32)
    assert baseline.weight_bytes == sum(p.nbytes for p in module.parameters())
    error = Oracle(traced, CPU).error(baseline.open(2), 2, 9)
    assert error < 1e-5


def test_dtype_of_a_baseline() -> None:
    cuda = torch.device("cuda")
    assert find_dtype(None, SIZES["130m"], cuda) is torch.float16
    assert find_dtype(None, SIZES["mamba2-2.7b"], cuda) is torch.bfloat16
    assert find_dtype(None, SIZES["130m"], CPU) is torch.float32
    assert find_dtype("bfloat16", None, CPU) is torch.bfloat16
    with pytest.raises(UsageError, match="float15"):
        find_dtype("float15", None, CPU)


def test_mamba_ssm_missing() -> None:
    with pytest.raises(DeviceError, match="CUDA device"):
        mamba_ssm(CPU)
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="not installed") as caught:
            mamba_ssm(torch.device("cuda"))
        assert "pip install" in str(caught.value.hint)
