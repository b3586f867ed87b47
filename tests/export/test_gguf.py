"""The format `gguf`, as the package gguf reads it and, where it is installed, llama.cpp runs it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from frontend.models import build, error, logits, tokens
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import ssmc
from ssmc.corpus import read_texts
from ssmc.demo import evaluation_file
from ssmc.errors import UnsupportedError, UsageError
from ssmc.export import Exported, export
from ssmc.export.checkpoint import read_checkpoint
from ssmc.runtime import CompiledModel

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
UNBOUNDED = {"time_step_limit": (0.0, float("inf"))}
TINY = [
    ("mamba", {}),
    ("falcon", {"mixer_rms_eps": 1e-5}),
    ("mamba2", UNBOUNDED),
    ("mamba2-groups", UNBOUNDED),
    ("jamba", {}),
    ("jamba", {"num_experts": 1, "num_experts_per_tok": 1}),
    ("llama", {}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama-biases", {}),
]


def written(
    model: Any, folder: Path, type: str, passes: str = "", scheme: str = "none"
) -> tuple[CompiledModel, Exported]:
    given = (
        {"samples": 2, "length": 64} if isinstance(model, str) else {"calibration": tokens(2, 9)}
    )
    made = ssmc.compile(model, passes=passes, scheme=scheme, **given)
    made.save(folder / "out")
    return made, export(folder / "out", None, "gguf", type=type)


def fields(path: Path) -> dict[str, Any]:
    return {name: f.contents() for name, f in gguf.GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file as float32, in torch's order of dimensions."""
    return {
        t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)).reshape(
            tuple(int(n) for n in reversed(t.shape))
        )
        for t in gguf.GGUFReader(path).tensors
    }


def model_of(path: Path, like: nn.Module) -> Any:
    """A model with the tensors of a file, whose names are found by the package's own table."""
    found, about = tensors(path), fields(path)
    kind = gguf.MODEL_ARCH[about["general.architecture"].upper()]
    table = gguf.get_tensor_name_map(kind, about[f"{about['general.architecture']}.block_count"])

    def named(name: str) -> Tensor:
        name = name.replace("dt_bias", "dt_proj.bias")
        if name.endswith("gate_up_proj"):
            prefix = name.replace("feed_forward", "mlp").removesuffix("gate_up_proj")
            halves = (table.get_name(f"{prefix}{half}_proj") for half in ("gate", "up"))
            return torch.cat([found.pop(f"{half}.weight") for half in halves], 1)
        name = name.replace("feed_forward.experts.down_proj", "mlp.experts.down_proj.weight")
        place = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if place == "output.weight" and place not in found:
            return found["token_embd.weight"]
        assert place in found, name
        if name.endswith("A_log"):
            return (-found.pop(place)).log()
        value = found[place] if place == "token_embd.weight" else found.pop(place)
        if kind == gguf.MODEL_ARCH.LLAMA and ("q_proj" in name or "k_proj" in name):
            heads = value.shape[0] // like.config.head_dim
            return value.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return value

    state = {name: named(name).reshape(t.shape) for name, t in like.state_dict().items()}
    found.pop("token_embd.weight")
    untied = type(like.config).from_dict(like.config.to_dict() | {"tie_word_embeddings": False})
    module = type(like)(untied).eval()
    module.load_state_dict(state)
    assert not {name for name in found if found[name].any()} - {"rope_freqs.weight"}
    return module


@pytest.mark.parametrize(("name", "changes"), TINY)
def test_a_file_is_the_model(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = build(name, **changes)
    made, done = written(model, tmp_path, "f32", passes="hadamard{residual=true}")
    assert done.kept == {}
    ids = tokens(2, 13)
    assert error(logits(model_of(done.out, model), ids), made.graph(ids)[0]) < 1e-5


def test_a_convolution_without_a_bias_gets_one_of_zeros(tmp_path: Path) -> None:
    model = build("mamba", use_conv_bias=False)
    _, done = written(model, tmp_path, "f32")
    assert torch.equal(tensors(done.out)["blk.1.ssm_conv1d.bias"], torch.zeros(48))
    ids = tokens(2, 13)
    assert error(logits(model_of(done.out, model), ids), logits(model, ids)) < 1e-6


def test_transformers_reads_it(shared_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = shared_model("llama-6m")
    made, done = written(str(source), tmp_path, "f32", "hadamard{residual=true}")
    config = load_gguf_checkpoint(done.out)["config"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    read = load_gguf_checkpoint(done.out, return_tensors=True, model_to_load=model)
    model.load_state_dict(read["tensors"])
    page = read_texts(evaluation_file())[0][:300]
    ids = torch.tensor([made.tokenizer.encode(page).ids])  # type: ignore[union-attr]
    assert error(logits(model, ids), made.graph(ids)[0]) < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=done.out.name)
    assert tokenizer(page).input_ids == ids[0].tolist()
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 0)


def test_eight_bits_are_within_half_a_step(tmp_path: Path) -> None:
    made, done = written("demo", tmp_path, "q8_0", "hadamard{residual=true}")
    exact = tensors(export(tmp_path / "out", None, "gguf", type="f32").out)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(done.out).tensors}
    assert set(done.kept) == {name for name, kind in types.items() if kind == "F16"}
    assert set(done.kept) == {f"blk.{i}.ssm_dt.weight" for i in range(8)}
    plain = ("norm.weight", "bias", "ssm_a", "ssm_d", "conv1d.weight")
    for name, found in tensors(done.out).items():
        assert types[name] == "F32" or not name.endswith(plain)
        if types[name] == "F32":
            assert torch.equal(found, exact[name])
        elif types[name] == "F16":
            assert torch.equal(found, exact[name].half().float())
        else:
            blocks = exact[name].unflatten(-1, (-1, 32))
            step = blocks.abs().amax(-1, keepdim=True) / 127
            # The scale is rounded to 11 bits, which moves the 127 steps of the largest by a 16th.
            assert ((found.view_as(blocks) - blocks).abs() <= (0.5 + 1 / 16) * step).all(), name
    assert types["output.weight"] == types["token_embd.weight"] == "Q8_0"
    model = ssmc.load_model("demo").module
    ids = torch.randint(8000, (1, 32))
    assert 0 < error(logits(model_of(done.out, model), ids), made.graph(ids)[0]) < 0.03


def test_metadata_of_a_hybrid(tmp_path: Path) -> None:
    _, done = written(build("jamba"), tmp_path, "f16")
    found = fields(done.out)
    assert found["general.architecture"] == "jamba"
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    expected = {
        "attention.head_count": 4,
        "attention.head_count_kv": [0, 0, 2, 0],
        "block_count": 4,
        "embedding_length": 24,
        "expert_count": 5,
        "expert_used_count": 2,
        "feed_forward_length": 40,
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 48,
        "ssm.state_size": 5,
        "ssm.time_step_rank": 3,
        "vocab_size": 97,
    }
    assert {name: found[f"jamba.{name}"] for name in expected} == expected
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(done.out).tensors}
    assert kinds["blk.1.ffn_gate_exps.weight"] == "F16"
    assert kinds["blk.1.ffn_gate_inp.weight"] == kinds["blk.0.ssm_a"] == "F32"
    assert found["tokenizer.ggml.model"] == "none"
    assert done.notes == ["no vocabulary, token ids alone: the artefact has no tokenizer"]


def test_frequencies_of_rotary_embeddings(tmp_path: Path) -> None:
    _, done = written(build("llama-biases"), tmp_path, "f32")
    found = fields(done.out)
    assert found["llama.rope.freq_base"] == 500
    assert found["llama.rope.dimension_count"] == found["llama.attention.key_length"] == 10
    factors = tensors(done.out)["rope_freqs.weight"]
    assert torch.allclose(factors, torch.full((5,), 4.0), rtol=1e-6)


def test_an_artefact_of_integers_is_what_they_stand_for(demo_folder: Path, tmp_path: Path) -> None:
    done = export(demo_folder, tmp_path / "demo.gguf", "gguf", type="f32")
    weights, rest = done.notes
    assert "weights are what the artefact's integers stand for" in weights
    assert rest.startswith("activations, states and caches are in llama.cpp's")
    checkpoint = read_checkpoint(ssmc.load(demo_folder, device="cpu").artefact)
    name = "backbone.layers.2.mixer.in_proj.weight"
    assert name in checkpoint.stored
    assert torch.equal(tensors(done.out)["blk.2.ssm_in.weight"], checkpoint.tensors[name])


YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 500.0}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bamba", {}, "models of type 'bamba'"),
        ("mamba-no-conv-bias", {}, r"'mamba' .* it has no 'mixer\.in_proj\.bias'"),
        ("mamba2-groups", {}, r"no limits of the time step \(0\.01, 0\.5\)"),
        ("mamba", {"expand": 3}, "twice as wide as the model, not 72"),
        ("llama", {"hidden_act": "gelu"}, "its activation is silu, not gelu"),
        ("llama", {"rope_parameters": YARN}, "default, linear, llama3, not yarn"),
    ],
)
def test_what_llama_cpp_cannot_express(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        written(build(name, **changes), tmp_path, "f32")
    assert "--format hf takes every model" in str(caught.value.hint)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_epsilon_for_all_norms_is_said(tmp_path: Path) -> None:
    _, done = written(build("falcon", mixer_rms_eps=1e-6), tmp_path, "f32")
    assert "have an epsilon of 1e-05, in the model 1e-06" in done.notes[0]


def test_a_file_is_replaced_only_with_force(tiny_artefact: Path, tmp_path: Path) -> None:
    out = export(tiny_artefact, tmp_path / "a.gguf", "gguf").out
    before = out.read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        export(tiny_artefact, out, "gguf", type="f32")
    assert out.read_bytes() == before
    export(tiny_artefact, out, "gguf", force=True)
    assert out.read_bytes() == before
    out.write_text("mine")
    with pytest.raises(UsageError, match="is another file"):
        export(tiny_artefact, out, "gguf", force=True)
    with pytest.raises(UsageError, match="is a folder"):
        export(tiny_artefact, tmp_path, "gguf", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf"]


def test_types_are_those_of_the_format(tiny_artefact: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gguf has no type 'q4_0'") as caught:
        export(tiny_artefact, tmp_path / "a.gguf", "gguf", type="q4_0")
    assert "q8_0" in str(caught.value.hint)
    with pytest.raises(UsageError, match="hf has no type 'f16'"):
        export(tiny_artefact, tmp_path / "a", "hf", type="f16")


def test_values_beyond_f16_are_refused(tmp_path: Path) -> None:
    model = build("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    with pytest.raises(UsageError, match=r"ffn_up\.weight has values that f16 cannot hold"):
        written(model, tmp_path, "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_the_package(
    tiny_artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match="needs the package gguf") as caught:
        export(tiny_artefact, tmp_path / "a.gguf", "gguf")
    assert caught.value.hint == "pip install 'ssmc[gguf]'"


def in_llama_cpp(path: Path, ids: list[int]) -> Tensor:
    """llama.cpp's logits, with keys and values in float32."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(
        str(path), n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0, n_threads=1
    )
    model.eval(ids)
    return torch.from_numpy(np.array(model.scores[: len(ids)]))


@pytest.mark.parametrize(("name", "changes"), TINY)
def test_llama_cpp_gives_the_logits(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    made, done = written(build(name, **changes), tmp_path, "f32", "hadamard{residual=true}")
    ids = tokens(1, 13)
    assert error(in_llama_cpp(done.out, ids[0].tolist()), made.graph(ids)[0][0]) < 1e-5


def test_llama_cpp_reads_texts_as_the_tokenizer_does(demo_folder: Path, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    done = export(demo_folder, tmp_path / "demo.gguf", "gguf")
    model = llama_cpp.Llama(str(done.out), vocab_only=True, verbose=False)
    tokenizer = ssmc.load(demo_folder, device="cpu").tokenizer
    assert tokenizer is not None
    for text in [*read_texts(evaluation_file()), "naïve  café\n\n\t 'Tis 123,456 — I'm\u00a0x  "]:
        assert model.tokenize(text.encode(), add_bos=True) == tokenizer.encode(text).ids
