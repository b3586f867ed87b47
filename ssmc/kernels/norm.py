"""Root-mean-square norms that end in int8: a row a program, read once."""

# A tuple of pieces grows in a loop that Triton unrolls; it knows no starred expressions.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.errors import UsageError
from ssmc.kernels.arithmetic import inverse_rms, scaled, silu
from ssmc.kernels.hadamard import is_few, plan, rotate_pieces, warps_for
from ssmc.kernels.launch import await_inputs, await_only, launch, let_next_load, row_view
from ssmc.kernels.pieces import (
    load_pieces,
    piece_width,
    products,
    store_pieces,
    store_quantized,
    sum_of,
)


@triton.jit
def _norm_kernel(
    x,
    x_stride,
    residual,
    residual_stride,
    weight,
    eps,
    total,
    q,
    scale,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    CHAIN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if weight is not None:
        weights = load_pieces(weight, N, WIDTH)
    await_inputs(CHAIN)
    pieces = load_pieces(x + row * x_stride, N, WIDTH)
    if residual is not None:
        before = load_pieces(residual + row * residual_stride, N, WIDTH)
        sums = ()
        for i in tl.static_range(len(pieces)):
            sums = sums + (before[i] + pieces[i],)
        pieces = sums
        store_pieces(total + row * N, pieces, N, WIDTH)
    inverse = inverse_rms(sum_of(products(pieces, pieces)), N, eps)
    normed = ()
    for i in tl.static_range(len(pieces)):
        y = pieces[i] * inverse
        if weight is not None:
            y = y * weights[i]
        normed = normed + (y,)
    store_quantized(q + row * N, scale + row, normed, 1.0, N, WIDTH)


def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    total: Tensor | None,
    num_warps: int | None,
) -> tuple[Tensor, Tensor]:
    flat = row_view(x)
    before = None if residual is None else row_view(residual)
    m, n = flat.shape
    warps = num_warps or min(8, max(1, triton.next_power_of_2(n + 1) // 1024))
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), device=x.device)
    launch(
        _norm_kernel,
        (m,),
        flat,
        flat.stride(0),
        before,
        0 if before is None else before.stride(0),
        weight,
        eps,
        total,
        q,
        scale,
        device=x.device,
        N=n,
        WIDTH=piece_width(n, warps),
        num_warps=warps,
    )
    return q, scale


def rms_norm_quantize(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-5, *, num_warps: int | None = None
) -> tuple[Tensor, Tensor]:
    """Kernel of `ssmc.ops.rms_norm_quantize`."""
    return _norm(x, None, weight, eps, None, num_warps)


def add_rms_norm_quantize(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    *,
    num_warps: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel of `ssmc.ops.add_rms_norm_quantize`."""
    total = torch.empty(x.shape, device=x.device)
    return total, *_norm(x, residual, weight, eps, total, num_warps)


@triton.jit
def _sum_of_group(
    pieces,
    GROUP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The sum of the values of group GROUP, which may begin and end inside a piece."""
    FIRST: tl.constexpr = GROUP * GROUP_SIZE // WIDTH
    LAST: tl.constexpr = ((GROUP + 1) * GROUP_SIZE - 1) // WIDTH
    total = tl.zeros([WIDTH], tl.float32)
    for i in tl.static_range(FIRST, LAST + 1):
        if i * WIDTH >= GROUP * GROUP_SIZE and (i + 1) * WIDTH <= (GROUP + 1) * GROUP_SIZE:
            total += pieces[i]
        else:
            group = (i * WIDTH + tl.arange(0, WIDTH)) // GROUP_SIZE
            total += tl.where(group == GROUP, pieces[i], 0.0)
    return tl.sum(total)


@triton.jit
def _of_groups(
    values,
    PIECE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """For each place of piece PIECE its group's value, of the tuple `values` of one a group."""
    FIRST: tl.constexpr = PIECE * WIDTH // GROUP_SIZE
    LAST: tl.constexpr = min((PIECE * WIDTH + WIDTH - 1) // GROUP_SIZE, len(values) - 1)
    chosen = values[FIRST]
    for group in tl.static_range(FIRST + 1, LAST + 1):
        columns = PIECE * WIDTH + tl.arange(0, WIDTH)
        chosen = tl.where(columns >= group * GROUP_SIZE, values[group], chosen)
    return chosen


@triton.jit
def _normalised(
    pieces,
    squares,
    eps,
    N: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(pieces, factor): each group over its root mean square, but for a factor of the row.

    With one group that is all there is to it, and whatever is linear may come before the factor.
    """
    if GROUP_SIZE == N:
        return pieces, inverse_rms(sum_of(squares), N, eps)
    else:
        inverses = ()
        for group in tl.static_range(N // GROUP_SIZE):
            total = _sum_of_group(squares, group, GROUP_SIZE, WIDTH)
            inverses = inverses + (inverse_rms(total, GROUP_SIZE, eps),)
        normed = ()
        for i in tl.static_range(len(pieces)):
            normed = normed + (pieces[i] * _of_groups(inverses, i, GROUP_SIZE, WIDTH),)
        return normed, 1.0


@triton.jit
def _gate_pieces(gates, gate_scale, scales):
    """silu of int8 gates with a scale for each channel, `scales` in pieces, or with the same."""
    silus = ()
    for i in tl.static_range(len(gates)):
        if len(scales) > 0:
            silus = silus + (silu(scaled(gates[i], scales[i])),)
        else:
            silus = silus + (silu(scaled(gates[i], tl.load(gate_scale))),)
    return silus


@triton.jit
def _load_if(wanted: tl.constexpr, start, N: tl.constexpr, WIDTH: tl.constexpr):
    """The pieces at `start`, or none."""
    if wanted:
        return load_pieces(start, N, WIDTH)
    else:
        return ()


@triton.jit
def _gated_kernel(
    x,
    x_stride,
    gate,
    gate_stride,
    gate_scale,
    weight,
    eps,
    q,
    scale,
    N: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    SCALE_PER_CHANNEL: tl.constexpr,
    FEW: tl.constexpr,
    WIDTH: tl.constexpr,
    SIGNS: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    INNER: tl.constexpr,
    BUNDLES: tl.constexpr,
    FACTOR: tl.constexpr,
    CHAIN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    # With few rows, which have registers to spare, what is constant comes before the inputs.
    weights = _load_if(FEW, weight, N, WIDTH)
    scales = _load_if(FEW and SCALE_PER_CHANNEL, gate_scale, N, WIDTH)
    await_only(CHAIN)
    y = load_pieces(x + row * x_stride, N, WIDTH)
    gates = load_pieces(gate + row * gate_stride, N, WIDTH)
    # Only now: the next kernel asks for its weight, behind which these loads would wait.
    let_next_load(CHAIN)
    scales = scales + _load_if(SCALE_PER_CHANNEL and not FEW, gate_scale, N, WIDTH)
    gates = _gate_pieces(gates, gate_scale, scales)
    if NORM_FIRST:
        y, factor = _normalised(y, products(y, y), eps, N, GROUP_SIZE, WIDTH)
        y = products(y, gates)
    else:
        y = products(y, gates)
        y, factor = _normalised(y, products(y, y), eps, N, GROUP_SIZE, WIDTH)
    y = products(y, weights + _load_if(not FEW, weight, N, WIDTH))
    y = rotate_pieces(y, SIGNS, DOUBLINGS, INNER, BUNDLES)
    store_quantized(q + row * N, scale + row, y, FACTOR * factor, N, WIDTH, BUNDLES)


def gated_norm_quantize(
    x: Tensor,
    gate_q: Tensor,
    gate_scale: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    block: int = 1,
    *,
    width: int = 256,
    num_warps: int | None = None,
    maxnreg: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Kernel of `ssmc.ops.gated_norm_quantize`.

    The operator's own definition runs where `ssmc.kernels.hadamard.plan` finds no rotation. Raises
    UsageError where group_size does not divide the width.
    """
    flat, gate = row_view(x), row_view(gate_q)
    m, n = flat.shape
    group = group_size or n
    if n % group:
        raise UsageError(f"gated_norm_quantize: group_size {group} does not divide the width {n}")
    rotation = plan(n, block, width)
    if rotation is None:
        return torch.ops.ssmc.gated_norm_quantize(
            x, gate_q, gate_scale, weight, eps, group_size, norm_before_gate, block
        )
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), device=x.device)
    launch(
        _gated_kernel,
        (m,),
        flat,
        flat.stride(0),
        gate,
        gate.stride(0),
        gate_scale,
        weight,
        eps,
        q,
        scale,
        device=x.device,
        N=n,
        GROUP_SIZE=group,
        NORM_FIRST=norm_before_gate,
        SCALE_PER_CHANNEL=gate_scale.numel() > 1,
        FEW=is_few(x),
        **rotation.constants(),
        num_warps=num_warps or warps_for(x),
        maxnreg=maxnreg,
    )
    return q, scale
