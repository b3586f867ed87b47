"""The format `compressed-tensors`, as transformers reads it with that package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from docs.blocks import ROOT, naming
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

import ssmc
from ssmc.corpus import read_texts
from ssmc.demo import evaluation_file
from ssmc.errors import UsageError
from ssmc.export import Exported, export
from ssmc.export.checkpoint import read_checkpoint
from ssmc.export.compressed_tensors import REPORT, pack
from ssmc.runtime import CompiledModel

# Half a unit of bfloat16, in which a file has tensors that are not integers: 2^-9 of each value.
ROUNDED = 4e-3


def compiled(model: str, tmp_path: Path, **recipe: Any) -> tuple[CompiledModel, Exported]:
    made = ssmc.compile(model, samples=2, length=64, **recipe)
    made.save(tmp_path / "artefact")
    return made, export(tmp_path / "artefact", tmp_path / "out", "compressed-tensors")


def text(model: CompiledModel) -> Tensor:
    assert model.tokenizer is not None
    page = next(iter(read_texts(evaluation_file())))
    return torch.tensor([model.tokenizer.encode(page).ids[:96]])


@torch.no_grad()
def difference(made: CompiledModel, done: Exported) -> float:
    """Of the logits in transformers, in float32, relative to those of the simulation."""
    model = AutoModelForCausalLM.from_pretrained(done.out, dtype=torch.float32)
    ids = text(made)
    expected = made.graph(ids)[0]
    return float((model(ids, use_cache=False).logits - expected).norm() / expected.norm())


def as_the_package_rounds(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs in int8 with a scale a token, absmax / 127.5 where ssmc has absmax / 127."""
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / scale).round().clamp(-128, 127), scale


def test_eight_bits_are_the_recipe_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, done = compiled("demo", tmp_path, recipe="dynamic")
    config = json.loads((done.out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert (group["weights"]["strategy"], group["input_activations"]["strategy"]) == (
        "channel", "token",
    )  # fmt: skip
    assert "lm_head" in config["ignore"]
    assert "backbone.layers.0.mixer.dt_proj" in config["ignore"]
    # Layer by layer: one rounding that falls otherwise changes all that come behind it.
    model = AutoModelForCausalLM.from_pretrained(done.out, dtype=torch.float32)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    stored = read_checkpoint(made.artefact).stored
    for name in stored:
        model.get_submodule(name.removesuffix(".weight")).register_forward_hook(
            lambda _, x, y, name=name: seen.update({name: (x[0], y)})
        )
    with torch.no_grad():
        model(text(made), use_cache=False)
    assert seen.keys() == stored.keys()
    for name, (x, y) in seen.items():
        q, scale = as_the_package_rounds(x)
        expected = (q * scale) @ (stored[name].q * stored[name].scale).T
        assert (y - expected).norm() / expected.norm() < 1e-5, name
    assert difference(made, done) < 0.03  # what the rest of 8 bits and another scale make
    example = naming(ROOT / "docs" / "export.md", "demo-compressed-tensors")
    (tmp_path / "demo-compressed-tensors").symlink_to(done.out)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(compile(example.text, example.path, "exec"), namespace)
    ids = torch.tensor([[5, 6, 7]])
    found = namespace["model"].generate(ids, max_new_tokens=4, do_sample=False)
    assert found.shape == (1, 7)


def test_four_bits_of_weights_are_the_recipe_simulated(
    shared_model: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = "quantise{weights=4,group=32,range=mse,activations=16}"
    made, done = compiled(str(shared_model("llama-6m")), tmp_path, passes=recipe, scheme="w4a16")
    config = json.loads((done.out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    (group,) = config["config_groups"].values()
    assert group["weights"]["group_size"] == 32
    assert group["input_activations"] is None
    assert difference(made, done) < ROUNDED


def test_a_mamba_in_four_bits_keeps_what_transformers_initialises(tmp_path: Path) -> None:
    recipe = "quantise{weights=4,group=32,activations=16}"
    made, done = compiled("demo", tmp_path, passes=recipe, scheme="w4a16")
    reason = "transformers does not load its weight packed"
    assert {name for name, why in done.kept.items() if why == reason} == {
        f"backbone.layers.{i}.mixer.out_proj.weight" for i in range(8)
    }
    assert difference(made, done) < ROUNDED


def test_a_hybrid_with_rotations(shared_model: Callable[[str], Path], tmp_path: Path) -> None:
    passes = "hadamard{residual=true},quantise{granularity=token,activations=16,head=false}"
    made, done = compiled(str(shared_model("jamba-11m")), tmp_path, passes=passes, scheme="w8a16")
    kept = json.loads((done.out / REPORT).read_text())["kept"]
    assert kept == done.kept
    assert "rotated at run time" in kept["model.layers.0.mamba.out_proj.weight"]
    assert "model.layers.1.feed_forward.experts.gate_up_proj" in kept
    assert difference(made, done) < 2 * ROUNDED  # rotated weights are rounded as well


def test_what_it_cannot_express(tmp_path: Path, demo_folder: Path) -> None:
    made = ssmc.compile("demo", passes="hadamard", scheme="none", samples=1, length=16)
    made.save(tmp_path / "a")
    with pytest.raises(UsageError, match=r"no linear layer .* it has no integers"):
        export(tmp_path / "a", tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()
    done = export(demo_folder, tmp_path / "out", "compressed-tensors")
    assert "static scales" in done.kept["backbone.layers.0.mixer.x_proj.weight"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="is not empty and no export"):
        export(demo_folder, tmp_path / "model", "compressed-tensors", force=True)


@given(st.integers(1, 5), st.integers(1, 40), st.sampled_from([2, 4, 8]), st.integers(0, 2**31))
def test_packing_is_the_packages(rows: int, columns: int, bits: int, seed: int) -> None:
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)
    found = unpack_from_int32(pack(q, bits), bits, torch.Size(q.shape))
    assert torch.equal(found.to(torch.int8), q)
