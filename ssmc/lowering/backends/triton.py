"""The `triton` backend: fused kernels for CUDA devices (`ssmc.kernels`).

Triton is imported when a graph is lowered for it, not before. With TRITON_INTERPRET=1 the kernels
run on a CPU, in Triton's interpreter: to check them, at toy sizes.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass

import torch

from ssmc.errors import DeviceError
from ssmc.lowering.backends.backend import Backend, Kernels, Tolerance
from ssmc.lowering.fusion import FUSIONS, SPLITS
from ssmc.lowering.steps import STEPS

KERNELS: dict[str, tuple[str, ...]] = {
    "attention": ("attention", "int8_attention"),
    "cache": ("cache_append", "cache_append_step"),
    "conv1d": (
        "int8_causal_conv1d",
        "int8_causal_conv1d_quantize",
        "int8_causal_conv1d_split",
    ),
    "embedding": ("int8_embedding",),
    "experts": ("int8_expert_linear",),
    "float_scan": ("selective_scan",),
    "hadamard": ("hadamard", "hadamard_quantize"),
    "matmul": ("int8_linear_quantize",),
    "matmul_int4": ("int4_linear",),
    "matmul_split": ("int8_linear_split",),
    "matvec": ("int8_linear", "int8_linear_add", "norm_linear_step"),
    "matvec_conv": ("in_proj_conv_step",),
    "norm": ("add_rms_norm_quantize", "gated_norm_quantize", "rms_norm_quantize"),
    "quantize": ("quantize", "quantize_dynamic"),
    "rotary": ("rotary_embedding",),
    "selective_scan": ("int8_selective_scan",),
    "selective_step": ("selective_scan_step",),
    "ssd_scan": ("int8_ssd_scan", "int8_ssd_scan_state"),
    "ssd_step": ("ssd_scan_step",),
}
"""Operators by the module of `ssmc.kernels` that has their kernel, under the operator's name."""

FLOATS = Tolerance(error=1e-4)
"""Floats made of exact integers: exponentials, and sums in another order."""

STATIC = Tolerance(error=1e-4, flips=0.002)
"""Integers with static scales, made of such floats."""

DYNAMIC = Tolerance(error=2**-7, flips=0.15)
"""Integers with scales of their own, made of such floats. Where the largest of a token lies at the
edge of a step, its scale is one bfloat16 step off, and many of its integers by one."""

PRODUCTS = Tolerance(error=2**-6)
"""Products of integers that are made inside the kernel, and so may differ as in `DYNAMIC`."""

TOLERANCES: dict[str, Tolerance] = {
    "add_rms_norm_quantize": DYNAMIC,
    "attention": FLOATS,
    "gated_norm_quantize": DYNAMIC,
    "hadamard": FLOATS,
    "hadamard_quantize": DYNAMIC,
    "in_proj_conv_step": DYNAMIC,
    "int4_linear": FLOATS,
    "int8_attention": FLOATS,
    "int8_causal_conv1d": FLOATS,
    "int8_causal_conv1d_quantize": STATIC,
    "int8_causal_conv1d_split": DYNAMIC,
    "int8_selective_scan": FLOATS,
    "int8_ssd_scan": Tolerance(error=2e-3),  # its products are of float16
    "int8_ssd_scan_state": Tolerance(error=2e-3),
    "norm_linear_step": PRODUCTS,
    "rms_norm_quantize": DYNAMIC,
    "rotary_embedding": FLOATS,
    "selective_scan_step": Tolerance(error=1e-3),  # its state may be rounded to 16 bits
    "selective_scan": FLOATS,
    "ssd_scan_step": PRODUCTS,  # B and C come as floats out of the convolution
}

INT4_TOLERANCES: dict[str, Tolerance] = {
    "int8_linear": FLOATS,  # the groups of a row, which have scales, are summed in float32
    "int8_linear_add": FLOATS,
    "int8_linear_quantize": STATIC,
    "int8_linear_split": DYNAMIC,
}


@dataclass(frozen=True)
class TritonBackend(Backend):
    """A backend whose kernels are loaded when they are needed."""

    def load(self) -> Kernels:
        """The kernels; DeviceError without Triton, or without a CUDA device to run them on."""
        return _load()

    def can_record(self, device: torch.device) -> bool:
        """As CUDA graphs."""
        return device.type == "cuda"


@functools.cache
def _load() -> Kernels:
    try:
        launch = importlib.import_module("ssmc.kernels.launch")
    except ImportError as error:
        raise DeviceError(
            f"the triton backend needs Triton, which cannot be imported: {error}",
            hint="pip install 'ssmc[cuda]', or use --backend cpu",
        ) from error
    if not torch.cuda.is_available() and not launch.INTERPRETED:
        raise DeviceError(
            "the triton backend needs a CUDA device",
            hint="use --backend cpu; TRITON_INTERPRET=1 runs the kernels on a CPU, very slowly",
        )
    modules = {name: importlib.import_module(f"ssmc.kernels.{name}") for name in KERNELS}
    return {
        f"ssmc::{name}": getattr(modules[module], name)
        for module, names in KERNELS.items()
        for name in names
    }


def _by_operator(tolerances: dict[str, Tolerance]) -> dict[str, Tolerance]:
    return {f"ssmc::{name}": tolerance for name, tolerance in tolerances.items()}


TRITON = TritonBackend(
    "triton",
    rules=(FUSIONS, SPLITS),
    step_rules=(FUSIONS, STEPS, SPLITS),
    tolerances=_by_operator(TOLERANCES),
    int4_tolerances=_by_operator(INT4_TOLERANCES),
    complete=True,
)
