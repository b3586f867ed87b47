"""The operators of the dialect, as functions with keyword defaults.

Each is `torch.ops.ssmc.<name>` with a reference in plain torch, a fake kernel and the layout
[batch, length, channels]; all are functional and take torch.fx proxies.
"""

from ssmc.ops.attention import attention, cache_append, int8_attention, rotary_embedding
from ssmc.ops.conv import causal_conv1d
from ssmc.ops.experts import expert_linear, int8_expert_linear, top_k
from ssmc.ops.fused_conv import int8_causal_conv1d_quantize, int8_causal_conv1d_split
from ssmc.ops.fused_linear import int8_linear_add, int8_linear_quantize, int8_linear_split
from ssmc.ops.fused_mlp import int8_expert_linear_sum, silu_mul_quantize, softmax_top_k
from ssmc.ops.fused_norm import (
    add_rms_norm_quantize,
    gated_norm_quantize,
    hadamard_quantize,
    rms_norm_quantize,
)
from ssmc.ops.fused_scan import int8_ssd_scan_state
from ssmc.ops.hadamard import hadamard
from ssmc.ops.int4 import int4_linear
from ssmc.ops.int8 import (
    int8_causal_conv1d,
    int8_embedding,
    int8_linear,
    int8_selective_scan,
    int8_ssd_scan,
)
from ssmc.ops.linear import embedding, linear
from ssmc.ops.norm import layer_norm, rms_norm, rms_norm_gated
from ssmc.ops.quantize import dequantize, dequantize_groups, quantize, quantize_dynamic
from ssmc.ops.selective_scan import selective_scan
from ssmc.ops.ssd_scan import ssd_scan
from ssmc.ops.state import dequantize_state, quantize_state
from ssmc.ops.steps import (
    cache_append_step,
    cache_quantize_step,
    in_proj_conv_step,
    norm_linear_step,
    normed_selective_scan_step,
    position_step,
    selective_scan_step,
    ssd_scan_step,
)

__all__ = [
    "add_rms_norm_quantize",
    "attention",
    "cache_append",
    "cache_append_step",
    "cache_quantize_step",
    "causal_conv1d",
    "dequantize",
    "dequantize_groups",
    "dequantize_state",
    "embedding",
    "expert_linear",
    "gated_norm_quantize",
    "hadamard",
    "hadamard_quantize",
    "in_proj_conv_step",
    "int4_linear",
    "int8_attention",
    "int8_causal_conv1d",
    "int8_causal_conv1d_quantize",
    "int8_causal_conv1d_split",
    "int8_embedding",
    "int8_expert_linear",
    "int8_expert_linear_sum",
    "int8_linear",
    "int8_linear_add",
    "int8_linear_quantize",
    "int8_linear_split",
    "int8_selective_scan",
    "int8_ssd_scan",
    "int8_ssd_scan_state",
    "layer_norm",
    "linear",
    "norm_linear_step",
    "normed_selective_scan_step",
    "position_step",
    "quantize",
    "quantize_dynamic",
    "quantize_state",
    "rms_norm",
    "rms_norm_gated",
    "rms_norm_quantize",
    "rotary_embedding",
    "selective_scan",
    "selective_scan_step",
    "silu_mul_quantize",
    "softmax_top_k",
    "ssd_scan",
    "ssd_scan_step",
    "top_k",
]
