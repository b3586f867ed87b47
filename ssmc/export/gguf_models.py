"""What llama.cpp calls a model's tensors, and how it lays them out.

The names are those of the GGUF specification; the layouts, and what the graph of an architecture
has no place for, those of llama.cpp (`src/models/` in its sources).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ssmc.errors import UnsupportedError
from ssmc.export import gguf_fields
from ssmc.export.checkpoint import Checkpoint
from ssmc.export.gguf_fields import Fields

Change = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Architecture:
    """A model type of transformers in llama.cpp.

    `names` has llama.cpp's name for each of the model's tensors (two, with a space between, for one
    that is stacked), those of layers without the layer; `changes` how a tensor becomes the one of
    that name. `fields` gives the metadata of a configuration, without the architecture in front,
    `unfit` why llama.cpp's graph is another. `extra` makes tensors that the model does not hold;
    `notes` say what is only nearly the same.
    """

    name: str
    names: dict[str, str]
    fields: Callable[[Any], Fields]
    changes: dict[str, Change] = field(default_factory=dict)
    unfit: Callable[[Any], Iterator[str]] = lambda config: iter(())
    extra: Callable[[Checkpoint], dict[str, Tensor]] = lambda found: {}
    notes: Callable[[Any], Iterator[str]] = lambda config: iter(())


def architecture(found: Checkpoint) -> Architecture:
    """The architecture of a checkpoint.

    Raises UnsupportedError for a model type that is not in ARCHITECTURES, and for a model of one
    that llama.cpp's graph cannot express.
    """
    config = found.skeleton.config
    made = ARCHITECTURES.get(config.model_type)
    if made is None:
        raise UnsupportedError(
            f"models of type '{config.model_type}' cannot be exported as GGUF",
            hint=f"those of type {', '.join(ARCHITECTURES)} can; --format hf takes every model",
        )
    reasons = [*made.unfit(config), *_homeless(made, found)]
    if reasons:
        raise UnsupportedError(
            f"llama.cpp's graph of '{made.name}' cannot express the model: {'; '.join(reasons)}",
            hint="--format hf takes every model",
        )
    return made


def named(made: Architecture, found: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's tensors, float32, with their names; each is made when it is asked for."""
    for name, value in found.tensors.items():
        if name in found.tied:
            continue
        layer, inner = _layer(name)
        for place in made.names[inner].split():
            change = made.changes.get(place)
            yield layer + place, value if change is None else change(value, found.skeleton.config)
    yield from made.extra(found).items()


def _homeless(made: Architecture, found: Checkpoint) -> Iterator[str]:
    unknown = {_layer(name)[1] for name in found.tensors} - made.names.keys()
    yield from (f"it has no '{name}'" for name in sorted(unknown))


def _layer(name: str) -> tuple[str, str]:
    """llama.cpp's prefix of the layer that a tensor is in, if any, and the name within it."""
    found = re.fullmatch(r"\w+\.layers\.(\d+)\.(.+)", name)
    return (f"blk.{found[1]}.", found[2]) if found else ("", name)


# -- how tensors change -----------------------------------------------------------------------


def _negative_exp(a_log: Tensor, config: Any) -> Tensor:
    """A = -exp(A_log)."""
    return -a_log.exp()


def _without_channel(weight: Tensor, config: Any) -> Tensor:
    """The weight of a depthwise convolution [N, 1, K] as [N, K]."""
    return weight.squeeze(1)


def _column(value: Tensor, config: Any) -> Tensor:
    return value[:, None]


def _grouped(weight: Tensor, config: Any) -> Tensor:
    return weight.unflatten(0, (config.n_groups, -1))


def _gate(stacked: Tensor, config: Any) -> Tensor:
    return stacked.chunk(2, 1)[0]


def _up(stacked: Tensor, config: Any) -> Tensor:
    return stacked.chunk(2, 1)[1]


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """The rows [N, ...] of q_proj or k_proj, for rotary pairs that are neighbours.

    transformers turns channel i of a head with i + half of its channels, llama.cpp's `llama` 2 i
    with 2 i + 1.
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _queries(rows: Tensor, config: Any) -> Tensor:
    return interleaved(rows, config.num_attention_heads)


def _keys(rows: Tensor, config: Any) -> Tensor:
    return interleaved(rows, config.num_key_value_heads)


def _no_bias(found: Checkpoint) -> dict[str, Tensor]:
    """Zeros for convolutions without a bias: llama.cpp adds one."""
    weights = {n: w for n, w in found.tensors.items() if n.endswith("conv1d.weight")}
    return {
        f"{_layer(name)[0]}ssm_conv1d.bias": torch.zeros(weight.shape[0])
        for name, weight in weights.items()
        if name.replace("weight", "bias") not in found.tensors
    }


def _frequencies(found: Checkpoint) -> dict[str, Tensor]:
    """What rotary frequencies are divided by, where that is not one."""
    config = found.skeleton.config
    rotary = next(m for m in found.skeleton.modules() if hasattr(m, "inv_freq"))
    wanted = type(rotary)(config).inv_freq.double()
    steps = torch.arange(len(wanted), dtype=torch.float64) / len(wanted)
    factors = config.rope_parameters["rope_theta"] ** -steps / wanted
    if torch.allclose(factors, torch.ones_like(factors), rtol=1e-6):
        return {}
    return {"rope_freqs.weight": factors.float()}


# -- names ------------------------------------------------------------------------------------


def _within(module: str, names: dict[str, str]) -> dict[str, str]:
    return {f"{module}.{name}": place for name, place in names.items()}


def _weights(layers: dict[str, str], kind: str = "weight") -> dict[str, str]:
    return {f"{name}.{kind}": f"{place}.{kind}" for name, place in layers.items()}


def _biases(layers: dict[str, str]) -> dict[str, str]:
    return _weights(layers, "bias")


_SCAN = {
    "in_proj.weight": "ssm_in.weight",
    "conv1d.weight": "ssm_conv1d.weight",
    "conv1d.bias": "ssm_conv1d.bias",
    "A_log": "ssm_a",
    "D": "ssm_d",
    "out_proj.weight": "ssm_out.weight",
}
_SELECTIVE = {
    **_SCAN,
    "x_proj.weight": "ssm_x.weight",
    "dt_proj.weight": "ssm_dt.weight",
    "dt_proj.bias": "ssm_dt.bias",
}
_INNER_NORMS = {
    "dt_layernorm.weight": "ssm_dt_norm.weight",
    "b_layernorm.weight": "ssm_b_norm.weight",
    "c_layernorm.weight": "ssm_c_norm.weight",
}
_SSD = {**_SCAN, "dt_bias": "ssm_dt.bias", "norm.weight": "ssm_norm.weight"}
_BACKBONE = {
    "backbone.embeddings.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "norm.weight": "attn_norm.weight",
}
_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
}
_ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
_MLP = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
_EXPERTS = {
    "router.weight": "ffn_gate_inp.weight",
    "experts.gate_up_proj": "ffn_gate_exps.weight ffn_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
}

_CHANGES: dict[str, Change] = {"ssm_a": _negative_exp, "ssm_conv1d.weight": _without_channel}

_MAMBA1 = Architecture(
    name="mamba",
    names=_BACKBONE | _within("mixer", _SELECTIVE),
    fields=gguf_fields.mamba,
    changes=_CHANGES,
    unfit=gguf_fields.unfit_mamba,
    extra=_no_bias,
)

ARCHITECTURES = {
    "mamba": _MAMBA1,
    "falcon_mamba": replace(_MAMBA1, notes=gguf_fields.one_epsilon),
    "mamba2": Architecture(
        name="mamba2",
        names=_BACKBONE | _within("mixer", _SSD),
        fields=gguf_fields.mamba2,
        changes={
            **_CHANGES,
            "ssm_a": lambda a_log, config: _column(_negative_exp(a_log, config), config),
            "ssm_d": _column,
            "ssm_norm.weight": _grouped,
        },
        unfit=gguf_fields.unfit_mamba2,
        extra=_no_bias,
    ),
    "jamba": Architecture(
        name="jamba",
        names={
            **_MODEL,
            "model.final_layernorm.weight": "output_norm.weight",
            "pre_ff_layernorm.weight": "ffn_norm.weight",
            **_within("mamba", _SELECTIVE | _INNER_NORMS),
            **_within("self_attn", _weights(_ATTENTION)),
            **_within("feed_forward", _weights(_MLP) | _EXPERTS),
        },
        fields=gguf_fields.jamba,
        changes={**_CHANGES, "ffn_gate_exps.weight": _gate, "ffn_up_exps.weight": _up},
        unfit=gguf_fields.unfit_jamba,
        extra=_no_bias,
    ),
    "llama": Architecture(
        name="llama",
        names={
            **_MODEL,
            "model.norm.weight": "output_norm.weight",
            "post_attention_layernorm.weight": "ffn_norm.weight",
            **_within("self_attn", _weights(_ATTENTION) | _biases(_ATTENTION)),
            **_within("mlp", _weights(_MLP) | _biases(_MLP)),
        },
        fields=gguf_fields.llama,
        changes={
            f"{layer}.{kind}": change
            for layer, change in (("attn_q", _queries), ("attn_k", _keys))
            for kind in ("weight", "bias")
        },
        unfit=gguf_fields.unfit_llama,
        extra=_frequencies,
    ),
}
