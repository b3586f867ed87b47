"""The operators of the dialect, as functions with keyword defaults.

Each is `torch.ops.ssmc.<name>` with a reference in plain torch, a fake kernel and the layout
[batch, length, channels]; all are functional and take torch.fx proxies.
"""

from ssmc.ops.conv import causal_conv1d
from ssmc.ops.hadamard import hadamard
from ssmc.ops.int8 import (
    int8_causal_conv1d,
    int8_embedding,
    int8_linear,
    int8_selective_scan,
    int8_ssd_scan,
)
from ssmc.ops.linear import embedding, linear
from ssmc.ops.norm import rms_norm, rms_norm_gated
from ssmc.ops.quantize import dequantize, quantize, quantize_dynamic
from ssmc.ops.selective_scan import selective_scan
from ssmc.ops.ssd_scan import ssd_scan

__all__ = [
    "causal_conv1d",
    "dequantize",
    "embedding",
    "hadamard",
    "int8_causal_conv1d",
    "int8_embedding",
    "int8_linear",
    "int8_selective_scan",
    "int8_ssd_scan",
    "linear",
    "quantize",
    "quantize_dynamic",
    "rms_norm",
    "rms_norm_gated",
    "selective_scan",
    "ssd_scan",
]
