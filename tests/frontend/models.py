"""Tiny language models of each supported architecture, with weights that make them talk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 97
SHAPES = [(3, 17), (1, 1), (2, 64)]
ARCHITECTURES = [
    "mamba",
    "mamba-no-conv-bias",
    "mamba2",
    "mamba2-groups",
    "falcon",
    "llama",
    "llama-biases",
    "jamba",
    "bamba",
    "granite",
    "falcon-h1",
    "falcon-h1-norm",
    "nemotron",
    "nemotron-experts",
    "qwen3",
    "zamba2",
    "zamba2-adapters",
]


def build(architecture: str, **changes: Any) -> nn.Module:
    """A model of three layers; the random part keeps all its tensors from being trivial."""
    import transformers as hf

    common: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 3}
    mamba2 = {"state_size": 12, "num_heads": 6, "head_dim": 8, "chunk_size": 8}
    llama = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}
    jamba = {
        **llama,
        "num_hidden_layers": 4,  # mixers, attention in the third layer; experts in every second
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "mamba_d_state": 5,
        "mamba_dt_rank": 3,
    }
    bamba = {
        **llama,
        "attn_layer_indices": [1],
        "mamba_d_state": 12,
        "mamba_n_heads": 6,
        "mamba_d_head": 8,
        "mamba_n_groups": 2,
        "mamba_chunk_size": 8,
    }
    granite = bamba | {
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
        "embedding_multiplier": 1.3,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.4,
        "logits_scaling": 1.7,
    }
    falcon_h1 = {
        **bamba,
        "mamba_d_ssm": 48,
        "key_multiplier": 0.6,
        "ssm_in_multiplier": 1.2,
        "ssm_out_multiplier": 0.9,
        "ssm_multipliers": [1.1, 0.8, 0.7, 1.3, 0.9],
        "attention_in_multiplier": 1.4,
        "attention_out_multiplier": 0.7,
        "mlp_multipliers": [0.8, 1.2],
        "embedding_multiplier": 1.3,
        "lm_head_multiplier": 0.5,
    }
    zamba2 = {
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "mamba_d_state": 12,
        "mamba_ngroups": 1,
        "n_mamba_heads": 6,
        "chunk_size": 8,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_mem_blocks": 1,  # both hybrid layers have one block's weights
        "adapter_rank": 4,
    }
    nemotron = {
        **llama,
        "layers_block_type": ["mamba", "attention", "mlp"],
        "mamba_num_heads": 6,
        "mamba_head_dim": 8,
        "ssm_state_size": 12,
        "n_groups": 2,
        "chunk_size": 8,
        "head_dim": 6,
    }
    model_class, config_class, options = {
        "mamba": (hf.MambaForCausalLM, hf.MambaConfig, {"state_size": 5}),
        "mamba-no-conv-bias": (
            hf.MambaForCausalLM,
            hf.MambaConfig,
            {"state_size": 5, "use_conv_bias": False, "use_bias": True, "conv_kernel": 3},
        ),
        "mamba2": (hf.Mamba2ForCausalLM, hf.Mamba2Config, {**mamba2, "n_groups": 1}),
        "mamba2-groups": (
            hf.Mamba2ForCausalLM,
            hf.Mamba2Config,
            {**mamba2, "n_groups": 2, "time_step_limit": (0.01, 0.5)},
        ),
        "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, llama),
        "llama-biases": (
            hf.LlamaForCausalLM,
            hf.LlamaConfig,
            {
                **llama,
                "attention_bias": True,
                "mlp_bias": True,
                "head_dim": 10,
                "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
            },
        ),
        "jamba": (hf.JambaForCausalLM, hf.JambaConfig, jamba),
        "bamba": (hf.BambaForCausalLM, hf.BambaConfig, bamba),
        "granite": (hf.GraniteMoeHybridForCausalLM, hf.GraniteMoeHybridConfig, granite),
        "falcon-h1": (hf.FalconH1ForCausalLM, hf.FalconH1Config, falcon_h1),
        "falcon-h1-norm": (
            hf.FalconH1ForCausalLM,
            hf.FalconH1Config,
            {**falcon_h1, "mamba_rms_norm": True, "key_multiplier": 1.0},
        ),
        "zamba2": (hf.Zamba2ForCausalLM, hf.Zamba2Config, zamba2),
        "zamba2-adapters": (
            hf.Zamba2ForCausalLM,
            hf.Zamba2Config,
            {
                **zamba2,
                "use_shared_attention_adapter": True,
                "use_mem_rope": True,
                "num_mem_blocks": 2,
                "num_hidden_layers": 5,
                "layers_block_type": ["hybrid", "mamba", "hybrid", "mamba", "hybrid"],
            },
        ),
        "nemotron": (hf.NemotronHForCausalLM, hf.NemotronHConfig, nemotron),
        "nemotron-experts": (
            hf.NemotronHForCausalLM,
            hf.NemotronHConfig,
            {
                **nemotron,
                "layers_block_type": ["mamba", "attention", "moe"],
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 16,
                "moe_shared_expert_intermediate_size": 20,
                "routed_scaling_factor": 1.5,
            },
        ),
        "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, {**llama, "head_dim": 10}),
        "falcon": (hf.FalconMambaForCausalLM, hf.FalconMambaConfig, {"state_size": 5}),
    }[architecture]
    torch.manual_seed(0)
    model = model_class(config_class(**(common | options | changes))).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, VOCABULARY, shape)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()
