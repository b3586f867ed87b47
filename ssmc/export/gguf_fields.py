"""A configuration of transformers as GGUF's metadata, and what llama.cpp has no place for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Fields = dict[str, Any]
UNBOUNDED = 2**20
"""The context length of models that have none."""
ROTARY = ("default", "linear", "llama3")
"""Rotary embeddings whose frequencies are the same at every length."""


def _mixer(config: Any) -> Fields:
    return {
        "context_length": UNBOUNDED,
        "embedding_length": config.hidden_size,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "block_count": config.num_hidden_layers,
        "ssm.conv_kernel": config.conv_kernel,
        "ssm.state_size": config.state_size,
        "attention.layer_norm_rms_epsilon": float(config.layer_norm_epsilon),
    }


def mamba(config: Any) -> Fields:
    """The metadata of Mamba and FalconMamba."""
    return _mixer(config) | {
        "ssm.inner_size": config.intermediate_size,
        "ssm.time_step_rank": int(config.time_step_rank),
        "ssm.dt_b_c_rms": config.model_type == "falcon_mamba",
    }


def mamba2(config: Any) -> Fields:
    """The metadata of Mamba-2."""
    return _mixer(config) | {
        "ssm.inner_size": config.num_heads * config.head_dim,
        "ssm.time_step_rank": config.num_heads,
        "ssm.group_count": config.n_groups,
    }


def _transformer(config: Any) -> Fields:
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }


def llama(config: Any) -> Fields:
    """The metadata of Llama."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return _transformer(config) | {
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": head,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }


def jamba(config: Any) -> Fields:
    """The metadata of Jamba; heads of keys and values a layer, 0 where a mixer is."""
    kinds = config.layers_block_type
    heads = [config.num_key_value_heads if kind == "attention" else 0 for kind in kinds]
    experts = {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
    }
    return _transformer(config) | {
        "attention.head_count_kv": heads,
        "ssm.conv_kernel": config.mamba_d_conv,
        "ssm.inner_size": config.mamba_expand * config.hidden_size,
        "ssm.state_size": config.mamba_d_state,
        "ssm.time_step_rank": int(config.mamba_dt_rank),
    } | (experts if config.num_experts > 1 else {})  # fmt: skip


def _unfit(config: Any) -> Iterator[str]:
    if config.hidden_act not in ("silu", "swish"):
        yield f"its activation is silu, not {config.hidden_act}"


def _unfit_width(config: Any, width: int) -> Iterator[str]:
    if width != 2 * config.hidden_size:
        yield f"its mixers are twice as wide as the model, not {width}"


def unfit_mamba(config: Any) -> Iterator[str]:
    """Why llama.cpp's Mamba is another."""
    yield from _unfit(config)
    yield from _unfit_width(config, config.intermediate_size)


def unfit_jamba(config: Any) -> Iterator[str]:
    """Why llama.cpp's Jamba is another."""
    yield from _unfit(config)
    yield from _unfit_width(config, config.mamba_expand * config.hidden_size)


def unfit_mamba2(config: Any) -> Iterator[str]:
    """Why llama.cpp's Mamba-2 is another."""
    yield from _unfit(config)
    low, high = config.time_step_limit
    if low > 0 or high != float("inf"):
        yield f"it has no limits of the time step ({low}, {high})"


def unfit_llama(config: Any) -> Iterator[str]:
    """Why llama.cpp's Llama is another."""
    yield from _unfit(config)
    kind = config.rope_parameters["rope_type"]
    if kind not in ROTARY:
        yield f"its rotary embeddings are {', '.join(ROTARY)}, not {kind}"


def one_epsilon(config: Any) -> Iterator[str]:
    """What is only nearly the same where norms have two epsilons."""
    mine, theirs = config.mixer_rms_eps, config.layer_norm_epsilon
    if mine != theirs:
        yield f"norms in front of scans have an epsilon of {theirs}, in the model {mine}"
