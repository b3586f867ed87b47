"""The `cpu` backend: int8 kernels that Numba compiles for the processor at hand.

Numba is imported when a graph is lowered for it, not before. Where it is missing, the backend is
that of `ssmc.lowering.backends.plain`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass

import torch

from ssmc.lowering.backends.backend import Backend, Kernels, Tolerance
from ssmc.lowering.backends.plain import PLAIN
from ssmc.lowering.fusion import FUSIONS, SPLITS
from ssmc.lowering.mlp import EXPERTS, GATES
from ssmc.lowering.steps import CACHE_STEPS, NORMED_SCAN, POSITION_STEP, STEPS

KERNELS: dict[str, tuple[str, ...]] = {
    "attention": ("attention", "int8_attention"),
    "cache": ("cache_append", "cache_append_step", "cache_quantize_step", "position_step"),
    "conv1d": (
        "int8_causal_conv1d",
        "int8_causal_conv1d_quantize",
        "int8_causal_conv1d_split",
    ),
    "embedding": ("int8_embedding",),
    "experts": ("int8_expert_linear", "int8_expert_linear_sum"),
    "linear": ("int8_linear", "int8_linear_add", "int8_linear_quantize", "int8_linear_split"),
    "mlp": ("silu_mul_quantize", "softmax_top_k"),
    "norm": (
        "add_rms_norm_quantize",
        "gated_norm_quantize",
        "hadamard",
        "hadamard_quantize",
        "rms_norm_quantize",
    ),
    "quantize": ("quantize", "quantize_dynamic"),
    "rotary": ("rotary_embedding",),
    "scan_step": ("normed_selective_scan_step", "selective_scan_step"),
    "selective_scan": ("int8_selective_scan",),
    "ssd_scan": ("int8_ssd_scan",),
    "steps": (
        "in_proj_conv_step",
        "int8_ssd_scan_state",
        "norm_linear_step",
        "ssd_scan_step",
    ),
}
"""Operators by the module of `ssmc.kernels.cpu` that has their kernel, under its name."""

PLAIN_CALLS = ("add", "to_dtype")
"""Calls of torch that have kernels too, in `elementwise`, with the same bits."""

FLOATS = Tolerance(error=1e-5)
"""Floats made of exact integers: exponentials, and sums in another order."""

STATIC = Tolerance(error=1e-5, flips=0.002)
"""Integers with static scales, made of such floats."""

DYNAMIC = Tolerance(error=2**-7, flips=0.15)
"""Integers with scales of their own, made of such floats. Where the largest of a token lies at the
edge of a step, its scale is one bfloat16 step off, and many of its integers by one."""

PRODUCTS = Tolerance(error=2**-6)
"""Products of integers that are made inside the call, and so may differ as in `DYNAMIC`."""

TOLERANCES: dict[str, Tolerance] = {
    "add_rms_norm_quantize": DYNAMIC,
    "attention": FLOATS,
    "gated_norm_quantize": DYNAMIC,
    "hadamard": FLOATS,
    "hadamard_quantize": DYNAMIC,
    "in_proj_conv_step": DYNAMIC,
    "int8_attention": FLOATS,
    "int8_causal_conv1d": FLOATS,
    "int8_causal_conv1d_quantize": STATIC,
    "int8_causal_conv1d_split": DYNAMIC,
    "int8_expert_linear_sum": FLOATS,
    "int8_selective_scan": FLOATS,
    "int8_ssd_scan": FLOATS,
    "int8_ssd_scan_state": Tolerance(error=1e-3),  # its state is rounded to 16 bits
    "norm_linear_step": PRODUCTS,
    "normed_selective_scan_step": PRODUCTS,
    "rms_norm_quantize": DYNAMIC,
    "rotary_embedding": FLOATS,
    "selective_scan_step": Tolerance(error=1e-3),  # its state may be rounded to 16 bits
    "silu_mul_quantize": DYNAMIC,
    "softmax_top_k": FLOATS,
    "ssd_scan_step": PRODUCTS,  # B and C come as floats out of the convolution
}


@dataclass(frozen=True)
class CPUBackend(Backend):
    """A backend whose kernels are loaded when they are needed."""

    def load(self) -> Kernels:
        """The kernels."""
        return _load()

    def can_record(self, device: torch.device) -> bool:
        """As tapes."""
        return device.type == "cpu"


@functools.cache
def _load() -> Kernels:
    modules = {name: importlib.import_module(f"ssmc.kernels.cpu.{name}") for name in KERNELS}
    found = {
        f"ssmc::{name}": getattr(modules[module], name)
        for module, names in KERNELS.items()
        for name in names
    }
    elementwise = importlib.import_module("ssmc.kernels.cpu.elementwise")
    return found | {name: getattr(elementwise, name) for name in PLAIN_CALLS}


COMPILED = CPUBackend(
    "cpu",
    rules=(EXPERTS, FUSIONS, GATES, SPLITS),
    step_rules=(EXPERTS, FUSIONS, GATES, NORMED_SCAN, CACHE_STEPS, STEPS, SPLITS, POSITION_STEP),
    tolerances={f"ssmc::{name}": tolerance for name, tolerance in TOLERANCES.items()},
)
CPU: Backend = COMPILED if importlib.util.find_spec("numba") is not None else PLAIN
