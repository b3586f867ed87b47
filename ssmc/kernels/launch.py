"""How kernels are launched: on a GPU chained without gaps, on a CPU in Triton's interpreter."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret


@functools.cache
def can_chain(device: torch.device) -> bool:
    """Whether a kernel may start before the one in front of it has ended (compute capability 9)."""
    return not INTERPRETED and torch.cuda.get_device_capability(device)[0] >= 9


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, device: torch.device, **meta: Any
) -> None:
    """Run `kernel` over `grid`, chained to the kernel in front where the device can.

    The kernel takes `CHAIN: tl.constexpr` and calls `await_inputs(CHAIN)` before it touches
    anything an earlier kernel wrote. Until then it may load what no kernel writes, and had better
    compute nothing of it: that would wait for these loads before it waits for the inputs.
    Multiplications and additions stay apart (no contraction), so that they round as in the
    reference; a kernel that wants a fused one calls `tl.fma`.
    """
    if 0 in grid:
        return
    chained = can_chain(device)
    options = {} if INTERPRETED else {"launch_pdl": chained, "enable_fp_fusion": False}
    if INTERPRETED:
        meta = {k: v for k, v in meta.items() if k not in ("num_warps", "num_stages", "maxnreg")}
    kernel[grid](*args, **meta, CHAIN=chained, **options)


@triton.jit
def await_inputs(CHAIN: tl.constexpr):
    """Wait for the kernel in front, then let the next one begin to load what is constant."""
    await_only(CHAIN)
    let_next_load(CHAIN)


@triton.jit
def await_only(CHAIN: tl.constexpr):
    """Wait for the kernel in front; the next one waits for this one's `let_next_load`, or end."""
    if CHAIN:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_load(CHAIN: tl.constexpr):
    """Let the next kernel begin to load what is constant before this one's inputs are there.

    So a weight may be on its way while several small kernels in front of its own are at work. For a
    kernel all of whose programs find room at once: where some have to wait for that, what the next
    ones load would come before what these still have to ask for.
    """
    if CHAIN:
        tl.extra.cuda.gdc_launch_dependents()


def row_view(x: Tensor) -> Tensor:
    """x [..., C] as [rows, C] with neighbouring channels; a view where the strides allow it."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x if x.dim() == 2 else x.flatten(0, -2)
