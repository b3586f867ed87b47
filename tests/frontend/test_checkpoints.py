"""Loading a model: what comes back, and one clear message for everything that can be wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from ssmc import demo
from ssmc.errors import NumericsError, UnsupportedError, UsageError
from ssmc.frontend import load_model, trace

from .conftest import EditTensors
from .models import build, error, logits, tokens

WEIGHTS = "model.safetensors"


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_demo_model() -> None:
    model = load_model("demo")
    assert (model.name, model.kind, model.folder) == ("demo", "demo", demo.model_folder())
    assert model.tokenizer is not None
    assert (
        model.tokenizer.decode(model.tokenizer.encode("In the beginning").ids) == "In the beginning"
    )
    assert model.eos_token_id == model.tokenizer.token_to_id("<|endoftext|>") == 0
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    assert not model.module.training
    assert model.float_bytes == 2 * 5_601_536
    weights = (demo.model_folder() / WEIGHTS).read_bytes()
    assert model.fingerprint == hashlib.sha256(weights).hexdigest()


def test_demo_text() -> None:
    for file, count in ((demo.calibration_file(), 256), (demo.evaluation_file(), 42)):
        lines = file.read_text(encoding="utf-8").splitlines()
        assert len(lines) == count
        assert all(json.loads(line)["text"] for line in lines)


def test_texts_are_encoded_whole(folder: Path) -> None:
    whole = load_model("demo").tokenizer
    assert whole is not None
    cut = Tokenizer.from_str(whole.to_str())
    cut.enable_truncation(4)
    cut.enable_padding(length=64)
    cut.save(str(folder / "tokenizer.json"))
    loaded = load_model(str(folder)).tokenizer
    assert loaded is not None
    text = "In the beginning was the Word, and the Word was with God."
    assert loaded.encode(text).ids == whole.encode(text).ids


def test_folder_without_tokenizer(folder: Path) -> None:
    model = load_model(str(folder))
    assert (model.name, model.kind, model.tokenizer) == ("tiny", "huggingface", None)
    ids = tokens(2, 7)
    assert error(logits(model.module, ids), logits(build("mamba"), ids)) < 1e-6


def test_shards(tmp_path: Path) -> None:
    build("mamba2-groups").save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    model = load_model(str(tmp_path))
    ids = tokens(2, 7)
    assert error(trace(model.module)(ids)[0], logits(build("mamba2-groups"), ids)) < 1e-5
    together = b"".join(shard.read_bytes() for shard in shards)
    assert model.fingerprint == hashlib.sha256(together).hexdigest()
    shards[1].unlink()
    with pytest.raises(UsageError, match=f"{shards[1].name} is missing"):
        load_model(str(tmp_path))


def test_end_of_text_of_generation_config_comes_first(folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=[11, 12])
    assert load_model(str(folder)).eos_token_id == 11
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id=13)
    assert load_model(str(folder)).eos_token_id == 13


def test_sixteen_bit_weights_become_float32(folder: Path, edit_tensors: EditTensors) -> None:
    edit_tensors(
        folder / WEIGHTS, lambda t: t.update({name: v.bfloat16() for name, v in t.items()})
    )
    edit_json(folder / "config.json", dtype="bfloat16")
    module = load_model(str(folder)).module
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    ids = tokens(2, 7)
    expected = logits(build("mamba").bfloat16().float(), ids)
    assert error(logits(module, ids), expected) < 1e-6


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "message", "hint"),
    [
        ("dmeo", "there is no model 'dmeo'", "did you mean demo"),
        ("/nowhere/at all", "there is no model '/nowhere/at all'", "config.json"),
        ("a/b/c", "there is no model 'a/b/c'", "config.json"),
        (__file__, "is a file", "folder"),
        (str(Path(__file__).parent), "has no config.json", "config.json"),
    ],
)
def test_unknown_target(target: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_model(target)
    assert caught.value.exit_code == 2
    assert hint in str(caught.value.hint)


def test_id_without_a_connection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="'nobody/nothing' is no local folder") as caught:
        load_model("nobody/nothing", revision="v1")
    assert "'v1'" in str(caught.value)
    assert "local folder" in str(caught.value.hint)


def test_revision_of_a_folder() -> None:
    with pytest.raises(UsageError, match="only a Hugging Face id has revisions"):
        load_model("demo", revision="main")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n "model_type": "mamba",\n "hidden_size": }', "config.json, line 3: Expecting value"),
        ("[1]", "config.json, line 1: a list, not a JSON object"),
        ('{"model_type": "mamba", "hidden_size": "wide"}', "config.json: .*hidden_size"),
        ('{"model_type": "mamba2", "hidden_size": 10}', "config.json: .*must equal num_heads"),
    ],
)
def test_broken_config(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_model(str(folder))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba3"}, "model type 'mamba3' is not known"),
        ({"model_type": None}, "model type 'None' is not known"),
        ({"model_type": "vit"}, "no causal language model for 'vit'"),
        ({"quantization_config": {"bits": 4}}, "already quantised"),
        (
            {"model_type": "gpt2"},
            r"Mamba-1 mixer \(in_proj, .*found in 'transformer.h.0' a GPT2Block",
        ),
    ],
)
def test_unsupported_architecture(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(folder / "config.json", **changes)
    with pytest.raises(UnsupportedError, match=message) as caught:
        load_model(str(folder))
    assert caught.value.exit_code == 3
    assert caught.value.hint


def pickled_only(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"a": torch.zeros(2)}, folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def pickled_under_the_name(folder: Path) -> None:
    torch.save({"a": torch.zeros(2)}, folder / WEIGHTS)


def old_pickle_under_the_name(folder: Path) -> None:
    torch.save({"a": torch.zeros(2)}, folder / WEIGHTS, _use_new_zipfile_serialization=False)


def lfs_pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def cut(length: int) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])


def index_without_map(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (pickled_only, "has only pytorch_model.bin, a pickled file"),
        (no_weights, "has neither model.safetensors nor"),
        (pickled_under_the_name, f"{WEIGHTS} is a pickled file where safetensors are expected"),
        (old_pickle_under_the_name, f"{WEIGHTS} is a pickled file where safetensors are"),
        (lfs_pointer, f"{WEIGHTS} is a Git LFS pointer"),
        (cut(-100), rf"{WEIGHTS} is truncated: \d+ of \d+ bytes"),
        (cut(500), f"{WEIGHTS} is truncated: 500 of more bytes"),
        (cut(5), f"{WEIGHTS} is not safetensors"),
        (cut(0), f"{WEIGHTS} is not safetensors"),
        (index_without_map, "index.json has no weight_map"),
    ],
)
def test_broken_weight_files(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    with pytest.raises(UsageError, match=message) as caught:
        load_model(str(folder))
    assert caught.value.exit_code == 2
    assert str(folder) in str(caught.value)
    assert caught.value.hint


D = "backbone.layers.1.mixer.D"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(D), f"tensors missing: {D}"),
        (lambda t: t.update(further=torch.zeros(1)), "another architecture: further"),
        (lambda t: t.update({D: torch.zeros(7)}), rf"another shape: {D} is \[7\], expected \[48\]"),
        (lambda t: t.clear(), r"tensors missing: .* and 30 more"),
    ],
)
def test_tensors_that_do_not_fit(
    folder: Path, edit_tensors: EditTensors, change: Callable[..., Any], message: str
) -> None:
    edit_tensors(folder / WEIGHTS, change)
    with pytest.raises(UsageError, match=message):
        load_model(str(folder))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(folder: Path, edit_tensors: EditTensors, bad: float) -> None:
    edit_tensors(folder / WEIGHTS, lambda t: t[D].__setitem__(3, bad))
    with pytest.raises(NumericsError, match=f"tensor '{D}'") as caught:
        load_model(str(folder))
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_other_broken_files(folder: Path, name: str) -> None:
    (folder / name).write_text("{")
    with pytest.raises(UsageError, match=name):
        load_model(str(folder))
