"""`ssmc.bench` on a GPU: sessions, and the baseline that is recorded there, at small sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssmc.bench.baselines import MambaSsm, find_dtype
from ssmc.bench.measure import Plan, measure
from ssmc.bench.plot import plot
from ssmc.bench.random_model import compile_random, random_recipe
from ssmc.bench.report import Report
from ssmc.bench.sizes import VOCABULARY, Size
from ssmc.bench.subjects import Compiled, Subject

pytestmark = pytest.mark.gpu

SMALL = [Size("small", "Mamba1", 256, 2), Size("small-2", "Mamba2", 256, 2)]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("size", SMALL, ids=lambda size: size.layer)
def test_measured_models_are_right_and_their_memory_is_known(size: Size, tmp_path: Path) -> None:
    subjects: list[Subject] = [
        Compiled("ours", compile_random(size, random_recipe("w8a8", None, "triton", 0), CUDA))
    ]
    plan = Plan(ttft=(97,), tpot=True, ttlt=((32, 8),), batches=(1, 5), n=5)
    result = measure(subjects, plan, CUDA)
    assert result.wrong == []
    assert len(result.measurements) == 6
    for m in result.measurements:
        assert 0 < m.timing.p10_ms <= m.timing.median_ms
        assert m.memory_bytes is not None
        assert m.memory_bytes >= subjects[0].weight_bytes
    plot(Report(subjects, plan, result, CUDA, 0), tmp_path / "plot.png")


@pytest.mark.parametrize("size", SMALL, ids=lambda size: size.layer)
def test_the_recorded_baseline_goes_on_from_its_prompt(size: Size) -> None:
    """Steps after a prompt give the logits of the longer prompt, also when all is replayed."""
    pytest.importorskip("mamba_ssm")
    runner = MambaSsm(size, CUDA, find_dtype(None, size, CUDA)).open(3)
    for _ in range(2):
        ids = torch.randint(0, VOCABULARY, (3, 40), device=CUDA)
        expected = runner.prefill(ids).clone()
        runner.prefill(ids[:, :36])
        for t in range(36, 40):
            logits = runner.step(ids[:, t : t + 1])
        assert ((logits - expected).norm() / expected.norm()).item() < 0.03
