"""`ssd_scan_step`: one position of the scan of Mamba-2, of any number of sequences.

All that counts is the state, which each program reads and writes once, in place.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ssmc.kernels.arithmetic import LOG2E, inverse_of, scale_for, softplus, to_int8
from ssmc.kernels.launch import await_inputs, launch, let_next_load
from ssmc.kernels.prefetch import prefetch_rows


@triton.jit
def _rounded(values):
    """A row [N], quantised with a scale of its own and dequantised."""
    scale = scale_for(tl.max(tl.abs(values), 0))
    return to_int8(values, inverse_of(scale)).to(tl.float32) * scale


@triton.jit
def _step_kernel(
    x_q,
    x_scale,
    x_steps,
    x_scale_steps,
    dt_q,
    dt_scale,
    dt_steps,
    dt_scale_step,
    A,
    BC,
    BC_step,
    D,
    dt_bias,
    dt_min,
    dt_max,
    state,
    y,
    heads,
    groups,
    width,
    rank,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    PREFETCH: tl.constexpr,
    CHAIN: tl.constexpr,
) -> None:
    """ROWS channels of one head of one sequence."""
    sequence, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    group = head // (heads // groups)
    p, n = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, RANK)
    in_p, in_n = p < width, n < rank
    in_tile = in_p[:, None] & in_n[None, :]
    channel = (sequence * heads + head) * width + p
    tile = state + channel[:, None] * rank + n[None, :]
    if PREFETCH:
        start = (sequence * heads + head) * width + tl.program_id(1) * ROWS
        size: tl.constexpr = state.dtype.element_ty.primitive_bitwidth // 8
        matrix = state.to(tl.pointer_type(tl.int8), bitcast=True)
        prefetch_rows(matrix, start, start + ROWS, rank * size, ROWS, CHAIN)
    rate = tl.load(A + head)
    bias = 0.0 if dt_bias is None else tl.load(dt_bias + head)
    skip = 0.0 if D is None else tl.load(D + head)
    dt_factor = tl.load(dt_scale + head * dt_scale_step)
    x_factor = tl.load(x_scale + head * x_scale_steps[0] + p * x_scale_steps[1], in_p, 0.0)
    let_next_load(CHAIN)
    await_inputs(CHAIN)
    h = tl.load(tile, in_tile, 0.0).to(tl.float32)
    row = BC + sequence * BC_step + group * rank + n
    B = tl.load(row, in_n, 0.0)
    C = tl.load(row + groups * rank, in_n, 0.0)
    dt = tl.load(dt_q + sequence * dt_steps[0] + head * dt_steps[1]).to(tl.float32)
    x = tl.load(x_q + sequence * x_steps[0] + head * x_steps[1] + p, in_p, 0)
    x = x.to(tl.float32) * x_factor
    B, C = _rounded(B), _rounded(C)
    dt = tl.minimum(tl.maximum(softplus(dt * dt_factor + bias), dt_min), dt_max)
    h = tl.fma((x * dt)[:, None], B[None, :], h * tl.exp2(dt * (rate * LOG2E)))
    tl.store(tile, h.to(state.dtype.element_ty), in_tile)
    result = tl.sum(h * C[None, :], 1)
    if D is not None:
        result += x * skip
    tl.store(y + channel, result, in_p)


def _steps(scale: Tensor, dims: int) -> tuple[int, ...]:
    """Strides of a scale of `dims` dimensions; zeros where it is one number."""
    return scale.stride() if scale.dim() else (0,) * dims


def _rows(heads: int, padded: int) -> int:
    """Channels a program: with few heads in all, few, so that every multiprocessor loads."""
    return min(padded, 8 if heads <= 256 else 16)


def ssd_scan_step(
    x_q: Tensor,
    x_scale: Tensor,
    dt_q: Tensor,
    dt_scale: Tensor,
    A: Tensor,
    BC: Tensor,
    groups: int,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    *,
    rows: int | None = None,
    num_warps: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssmc.ops.ssd_scan_step`, in place: returns y float32 [B, 1, H, P] and the state it is given.

    The state is contiguous [B, H, P, N], float32 or bfloat16. x_scale is [] or [H, P], dt_scale []
    or [H]. A program takes `rows` channels of a head.
    """
    batch, _, heads, width = x_q.shape
    rank = state.shape[3]
    rows = rows or _rows(batch * heads, triton.next_power_of_2(width))
    x_q = x_q if x_q.stride(3) == 1 or width == 1 else x_q.contiguous()
    y = A.new_empty((batch, 1, heads, width))
    launch(
        _step_kernel,
        (batch * heads, triton.cdiv(width, rows)),
        *(x_q, x_scale, (x_q.stride(0), x_q.stride(2)), _steps(x_scale, 2)),
        *(dt_q, dt_scale, (dt_q.stride(0), dt_q.stride(2)), *_steps(dt_scale, 1)),
        *(A, BC, BC.stride(0), D, dt_bias, dt_min, dt_max, state, y),
        *(heads, groups, width, rank),
        device=x_q.device,
        ROWS=rows,
        RANK=triton.next_power_of_2(rank),
        PREFETCH=width % rows == 0 and rank * state.element_size() % 64 == 0,
        # One warp sums over a row of the state, and the largest of B and C, without barriers.
        num_warps=num_warps or (1 if rows <= 8 else 2),
    )
    return y, state
