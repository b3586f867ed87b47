"""lm-eval's own model for transformers runs an exported artefact."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssmc.cli.target import open_target
from ssmc.export import export

pytest.importorskip("lm_eval", reason="needs lm-eval: make test-eval")
pytest.importorskip("accelerate", reason="lm-eval needs accelerate to run transformers")

from lm_eval.models.huggingface import HFLM

from ssmc.evaluate.harness import HarnessModel

from .test_harness import STOP, requests

PAIRS = [("In the beginning God created", " the heaven"), ("The old man and", " the sea was near")]


def test_an_exported_artefact_scores_as_in_ssmc(demo_folder: Path, tmp_path: Path) -> None:
    folder = export(demo_folder, tmp_path / "hf").out
    theirs = HFLM(pretrained=str(folder), device="cpu", batch_size=2, max_length=256)
    target = open_target(str(demo_folder), device="cpu")
    assert target.tokenizer is not None
    assert target.eos is not None
    ours = HarnessModel(target.run, target.tokenizer, target.eos, longest=256)
    wanted = requests("loglikelihood", PAIRS)
    found = theirs.loglikelihood(wanted, disable_tqdm=True)
    expected = ours.loglikelihood(wanted)
    assert [s[0] for s in found] == pytest.approx([s[0] for s in expected], abs=1e-4)
    assert [s[1] for s in found] == [s[1] for s in expected]
    prompts = [(before, STOP) for before, _ in PAIRS]
    going_on = requests("generate_until", prompts)
    assert theirs.generate_until(going_on, disable_tqdm=True) == ours.generate_until(going_on)
