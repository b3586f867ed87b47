"""state-spaces checkpoints: a Hugging Face model, renamed backwards, loads to the same logits."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ssmc.errors import UnsupportedError, UsageError
from ssmc.frontend import load_model, trace

from .models import build, error, logits, tokens

CONFIG = {
    "mamba": {"ssm_cfg": {"d_state": 5}, "vocab_size": 93},
    "mamba2-groups": {
        "ssm_cfg": {
            "layer": "Mamba2",
            "d_state": 12,
            "headdim": 8,
            "ngroups": 2,
            "dt_limit": [0.01, 0.5],
        },
        "vocab_size": 96,
        "tie_embeddings": False,
    },
}


def save(model: nn.Module, folder: Path, legacy: bool = False, **config: Any) -> None:
    """`model` in the layout of mamba_ssm."""
    tensors = {
        name.replace(".embeddings.", ".embedding."): tensor.half().float()
        for name, tensor in model.state_dict().items()
    }
    new = not legacy
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    sizes = {"d_model": 24, "n_layer": 3, "pad_vocab_size_multiple": 8, "rms_norm": True}
    (folder / "config.json").write_text(json.dumps(sizes | config))


@pytest.mark.parametrize("architecture", CONFIG)
@pytest.mark.parametrize("legacy", [False, True])
def test_converted_model_has_the_same_logits(
    architecture: str, legacy: bool, tmp_path: Path
) -> None:
    model = build(architecture, vocab_size=96).half().float()
    save(model, tmp_path, legacy, **CONFIG[architecture])
    loaded = load_model(str(tmp_path))
    assert (loaded.kind, loaded.eos_token_id) == ("state-spaces", 0)
    ids = tokens(2, 19) % 90
    assert error(logits(loaded.module, ids), logits(model, ids)) < 1e-6
    assert error(trace(loaded.module)(ids)[0], logits(model, ids)) < 1e-5


def test_trained_model_survives_the_round_trip(tmp_path: Path, shared_model: Any) -> None:
    source = shared_model("mamba2-6m")
    model = load_model(str(source))
    save(
        model.module, tmp_path, d_model=256, n_layer=8, vocab_size=8192, ssm_cfg={"layer": "Mamba2"}
    )
    shutil.copy(source / "tokenizer.json", tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.tokenizer is not None
    assert loaded.float_bytes == model.float_bytes
    ids = torch.randint(2, 8192, (2, 19))
    exact = model.module.half().float()
    assert error(logits(loaded.module, ids), logits(exact, ids)) < 1e-6


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"attn_layer_idx": [1]}, "attention layers"),
        ({"d_intermediate": 64}, "MLP blocks"),
        ({"rms_norm": False}, "LayerNorm"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 7}}, "heads of 7 in 48 channels"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim"),
        ({"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "rmsnorm false"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 24}}, "d_ssm"),
    ],
)
def test_what_does_not_convert(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(nn.Linear(2, 2), tmp_path, vocab_size=96, **config)
    with pytest.raises(UnsupportedError, match=message) as caught:
        load_model(str(tmp_path))
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"d_model": "wide"}, "config.json: d_model: "),
        ({"ssm_cfg": {"layer": "Mamba7"}}, "config.json: ssm_cfg.layer: "),
        ({"ssm_cfg": {"d_stat": 3}}, "config.json: ssm_cfg.d_stat: "),
        ({"vocab_size": None}, "config.json: vocab_size: "),
    ],
)
def test_wrong_values(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(nn.Linear(2, 2), tmp_path, **({"vocab_size": 96} | config))
    with pytest.raises(UsageError, match=message):
        load_model(str(tmp_path))


class Harmful:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def test_malicious_pickle_is_refused_without_running(tmp_path: Path) -> None:
    save(build("mamba", vocab_size=96), tmp_path, vocab_size=96, ssm_cfg={"d_state": 5})
    trace_of_it = tmp_path / "executed"
    torch.save({"x": Harmful(trace_of_it)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"pytorch_model\.bin cannot be read as tensors only"):
        load_model(str(tmp_path))
    assert not trace_of_it.exists()


def test_broken_weight_files(tmp_path: Path) -> None:
    save(build("mamba", vocab_size=96), tmp_path, vocab_size=96, ssm_cfg={"d_state": 5})
    file = tmp_path / "pytorch_model.bin"
    whole = file.read_bytes()
    for content in (whole[:-200], whole[:100], b""):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=r"pytorch_model\.bin cannot be read"):
            load_model(str(tmp_path))
    torch.save([torch.zeros(2)], file)
    with pytest.raises(UsageError, match="not a dictionary of tensors"):
        load_model(str(tmp_path))
    file.unlink()
    with pytest.raises(UsageError, match=r"has no pytorch_model\.bin"):
        load_model(str(tmp_path))


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    model = build("mamba", vocab_size=96)
    model.backbone.norm_f = nn.Identity()
    save(model, tmp_path, vocab_size=96, ssm_cfg={"d_state": 5})
    with pytest.raises(UsageError, match=r"tensors missing: backbone\.norm_f\.weight"):
        load_model(str(tmp_path))
