"""Variants branched off one calibrated graph: what they are, and what their scores say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from core.tiny import language_model

from ssmc.compiler import Hooks, finish, read_source
from ssmc.core.text import graph_text
from ssmc.corpus import read_texts, token_windows
from ssmc.errors import UsageError
from ssmc.recipe import make_recipe
from ssmc.runtime.artefact import TENSORS
from ssmc.tuning.trials import Score, Trials, held_out_windows

from .conftest import MakeTrials, calibrated, windows

FEW = ("layer.0.in_proj:w4a16", "head:float")


def test_a_variant_is_what_a_compilation_makes(trials: MakeTrials, tmp_path: Path) -> None:
    tried = trials()
    tried.score(("*:float",))  # another variant before it leaves no trace
    variant = tried.variant(FEW)
    options = {"group": 8, "overrides": list(FEW)}
    recipe = make_recipe(passes=["absmax", {"quantise": options}])
    compiled = finish(calibrated(language_model("mamba"), recipe), recipe, Hooks())
    assert graph_text(variant) == graph_text(compiled.graph)
    for name, tensor in compiled.graph.params().items():
        assert torch.equal(tensor, variant.params()[name]), name
    file = compiled.save(tmp_path / "out") / TENSORS
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert tried.score(FEW).bytes == file.stat().st_size - header


def test_a_variant_has_the_clusters_that_calibration_found() -> None:
    recipe = make_recipe(passes="sort-and-cluster,absmax,quantise{granularity=tensor}")
    model = language_model("mamba2")
    tried = Trials(calibrated(model, recipe), recipe, windows())
    variant = tried.variant(tried.own).params()
    compiled = finish(calibrated(model, recipe), recipe, Hooks()).graph.params()
    assert list(variant) == list(compiled)
    assert all(torch.equal(tensor, variant[name]) for name, tensor in compiled.items())


def test_scores(trials: MakeTrials) -> None:
    tried = trials()
    plain, eight, four = (tried.score((f"*:{form}",)) for form in ("float", "w8a8", "w4a8"))
    assert (plain.kl, plain.perplexity, plain.loss) == (0.0, 0.0, 0.0)
    assert 0 < eight.kl < four.kl
    assert four.bytes < eight.bytes < plain.bytes
    assert eight.kl_error is not None
    assert 0 < eight.kl_error < eight.kl
    assert tried.count == 3
    tried.score(("*:w8a8",))
    assert tried.count == 3


def test_kl_is_the_definition(trials: MakeTrials) -> None:
    tried = trials()
    g, ids = tried.variant(()), tried.windows
    p, q = (m(ids[:, :-1])[0].double().softmax(-1) for m in (tried.graph, g))
    expected = (p * (p / q).log()).sum(-1).mean().item()
    assert tried.score(()).kl == pytest.approx(expected, rel=1e-3)
    targets = ids[:, 1:, None]
    rise = (p.gather(2, targets) / q.gather(2, targets)).log().mean().exp().item() - 1
    assert tried.score(()).perplexity == pytest.approx(rise, rel=1e-3)


def test_loss_is_the_greater_of_both() -> None:
    assert Score(0.01, None, 0.5, 0).loss == 0.5
    assert Score(0.01, None, -0.5, 0).loss == math.expm1(0.01)


def test_held_out_windows_are_those_that_calibration_left(tiny_folder: Path) -> None:
    text = tiny_folder / "text.txt"
    recipe = make_recipe(calibration=str(text), samples=4, length=16)
    source = read_source(str(tiny_folder), recipe)
    held = held_out_windows(source, recipe, None, 5)
    used = torch.cat([batch[0] for batch in source.calibration])
    assert (len(used), len(held)) == (4, 5)
    assert not (used[:, None] == held[None]).all(-1).any()
    chosen = held_out_windows(source, recipe, text, 1000)
    from tokenizers import Tokenizer

    assert source.tokenizer is not None
    tokenizer = Tokenizer.from_str(source.tokenizer)
    cut = token_windows(tokenizer, read_texts(text), source.about["eos"], 16)
    assert sorted(chosen.tolist()) == sorted(cut.tolist())


def test_no_window_left(tiny_folder: Path) -> None:
    recipe = make_recipe(calibration=str(tiny_folder / "text.txt"), samples=64, length=64)
    source = read_source(str(tiny_folder), recipe)
    with pytest.raises(UsageError, match="calibration uses all 3 windows"):
        held_out_windows(source, recipe, None, 4)
