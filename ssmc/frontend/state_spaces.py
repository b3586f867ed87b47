"""state-spaces checkpoints (`MambaLMHeadModel`), renamed into the Hugging Face classes.

The folder holds config.json and pytorch_model.bin; mamba_ssm is not imported. Defaults are
those of mamba_ssm's MambaConfig, Mamba and Mamba2.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from ssmc.errors import UnsupportedError, UsageError
from ssmc.frontend.weights import first_line

WEIGHTS = "pytorch_model.bin"
_END_OF_TEXT = 0  # of the GPT-NeoX tokenizer these models are trained with


class SsmConfig(BaseModel):
    """`ssm_cfg`: the mixer's options, those of training included."""

    model_config = ConfigDict(extra="forbid")

    layer: Literal["Mamba1", "Mamba2"] = "Mamba1"
    d_state: int | None = None
    d_conv: int = 4
    expand: int = 2
    bias: bool = False
    conv_bias: bool = True
    dt_rank: int | Literal["auto"] = "auto"
    headdim: int = 64
    ngroups: int = 1
    d_ssm: int | None = None
    D_has_hdim: bool = False
    rmsnorm: bool = True
    norm_before_gate: bool = False
    dt_limit: tuple[float, float] = (0.0, math.inf)
    chunk_size: int = 256
    # initialisation and choice of kernel: without effect on what a trained model computes
    A_init_range: Any = None
    conv_init: Any = None
    dt_init: Any = None
    dt_init_floor: Any = None
    dt_max: Any = None
    dt_min: Any = None
    dt_scale: Any = None
    use_fast_path: Any = None
    use_mem_eff_path: Any = None


class Config(BaseModel):
    """config.json of a `MambaLMHeadModel`."""

    d_model: int
    n_layer: int
    vocab_size: int
    d_intermediate: int = 0
    ssm_cfg: SsmConfig = SsmConfig()
    attn_layer_idx: list[int] = []
    rms_norm: bool = True
    residual_in_fp32: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


def describes(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of `MambaLMHeadModel`."""
    return {"d_model", "n_layer"} <= raw.keys() and "model_type" not in raw


def parse(raw: Mapping[str, Any], name: str) -> Config:
    """A validated configuration; `name` is the folder's, for messages.

    Raises UsageError for a wrong value, UnsupportedError for what has no Hugging Face class:
    attention layers, MLP blocks, LayerNorm, and the rarer options of Mamba2.
    """
    try:
        config = Config.model_validate(dict(raw))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{name}/config.json: {where}: {first['msg']}") from None
    for reason in _obstacles(config):
        raise UnsupportedError(
            f"{name}: state-spaces checkpoint with {reason}",
            hint="supported are models of Mamba1 or Mamba2 layers with RMSNorm",
        )
    return config


def _obstacles(config: Config) -> list[str]:
    ssm = config.ssm_cfg
    inner = config.d_model * ssm.expand
    mamba2 = ssm.layer == "Mamba2"
    checks = {
        "attention layers (attn_layer_idx)": bool(config.attn_layer_idx),
        "MLP blocks (d_intermediate > 0)": config.d_intermediate > 0,
        "LayerNorm (rms_norm false)": not config.rms_norm,
        "a skip weight for each channel (D_has_hdim)": mamba2 and ssm.D_has_hdim,
        "no norm before out_proj (rmsnorm false)": mamba2 and not ssm.rmsnorm,
        "the gate after the norm (norm_before_gate)": mamba2 and ssm.norm_before_gate,
        "channels outside the SSM (d_ssm)": mamba2 and ssm.d_ssm not in (None, inner),
        f"heads of {ssm.headdim} in {inner} channels": mamba2 and inner % ssm.headdim != 0,
    }
    return [reason for reason, found in checks.items() if found]


def translate(config: Config) -> dict[str, Any]:
    """The values of the Hugging Face config.json of the same model."""
    ssm = config.ssm_cfg
    multiple = config.pad_vocab_size_multiple
    common = {
        "vocab_size": math.ceil(config.vocab_size / multiple) * multiple,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "layer_norm_epsilon": 1e-5,
        "expand": ssm.expand,
        "conv_kernel": ssm.d_conv,
        "use_bias": ssm.bias,
        "use_conv_bias": ssm.conv_bias,
        "residual_in_fp32": config.residual_in_fp32,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": _END_OF_TEXT,
        "eos_token_id": _END_OF_TEXT,
        "pad_token_id": _END_OF_TEXT,
    }
    return common | (_mamba1(ssm) if ssm.layer == "Mamba1" else _mamba2(ssm, config.d_model))


def _mamba1(ssm: SsmConfig) -> dict[str, Any]:
    return {
        "model_type": "mamba",
        "state_size": 16 if ssm.d_state is None else ssm.d_state,
        "time_step_rank": ssm.dt_rank,
    }


def _mamba2(ssm: SsmConfig, d_model: int) -> dict[str, Any]:
    return {
        "model_type": "mamba2",
        "state_size": 128 if ssm.d_state is None else ssm.d_state,
        "head_dim": ssm.headdim,
        "num_heads": d_model * ssm.expand // ssm.headdim,
        "n_groups": ssm.ngroups,
        "chunk_size": ssm.chunk_size,
        "time_step_limit": ssm.dt_limit,
    }


def read_tensors(folder: Path, config: Config) -> dict[str, Tensor]:
    """The tensors of pytorch_model.bin under their Hugging Face names.

    Only tensors are unpickled, and only as they are used. Raises UsageError for a file that is
    missing, damaged, or holds anything else.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        raise UsageError(f"{folder} has no {WEIGHTS}", hint="give the folder with the weights")
    try:
        loaded = torch.load(file, weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a hostile or damaged file can make the reader raise anything
        raise UsageError(
            f"{file} cannot be read as tensors only, and nothing else is: {first_line(error)}",
            hint="download the file again, from a source you trust",
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise UsageError(f"{file} is not a dictionary of tensors")
    if config.tie_embeddings:
        loaded.pop("lm_head.weight", None)
    return {
        name.replace("backbone.embedding.", "backbone.embeddings."): tensor
        for name, tensor in loaded.items()
    }
