"""in_proj of decoding with the step of the convolution that follows it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmc.errors import UsageError
from ssmc.kernels import matvec_int4
from ssmc.kernels.arithmetic import inverse_of, to_int8
from ssmc.kernels.conv_step import conv_step, load_history, load_taps
from ssmc.kernels.launch import await_inputs, launch, row_view
from ssmc.kernels.matvec import load_constants, load_norm, matvec, piece_of
from ssmc.kernels.matvec_tiles import load_bias, product, quantized
from ssmc.kernels.pieces import load_pieces, normed
from ssmc.ops.conv import ACTIVATIONS

BLOCK_C = 256


@triton.jit
def _in_proj_kernel(
    x,
    x_stride,
    norm_weight,
    eps,
    rows,
    w,
    w_scale,
    w_scale_step,
    bias,
    out_scale,
    out_scale_step,
    conv_start,
    conv_w,
    conv_w_scale,
    conv_w_scale_step,
    conv_bias,
    state,
    u_scale,
    q,
    u_q,
    y,
    N,
    C,
    U,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    PIECE: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHAIN: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    held = tl.minimum(n, N - 1)
    c = n - conv_start
    inside = (c >= 0) & (c < C)
    # Nothing is computed of these yet: that would wait for them before the inputs are waited for.
    norm_weights = load_norm(norm_weight, K, PIECE)
    q_scale = tl.load(out_scale + held * out_scale_step)
    b = load_bias(bias, held)
    taps = load_taps(conv_w, conv_w_scale, conv_w_scale_step, conv_bias, c, inside, TAPS)
    channel_scale = tl.load(u_scale + c, mask=inside & (c < U), other=1.0)
    weight, scales = load_constants(w, w_scale, w_scale_step, held, K, PARTS, GROUP, COLUMNS)
    # The kernels behind are not let in before: not all programs of a large one find room at once.
    await_inputs(CHAIN)
    for row in range(rows):
        row_state = state + row * ((TAPS - 1) * C)
        pieces = load_pieces(x + row * x_stride, K, PIECE)
        history = load_history(row_state, c, inside, C, TAPS)
        pieces, largest = normed(pieces, norm_weights, eps, K)
        words, scale = quantized(pieces, largest, PARTS)
        result = product(weight, scales, words, scale, GROUP) + b
        result = to_int8(result, inverse_of(q_scale))
        tl.store(q + row * N + n, result, mask=n < N)
        conv_step(
            result,
            q_scale,
            history,
            taps,
            row_state,
            channel_scale,
            u_q + row * U,
            y + row * (C - U),
            c,
            inside,
            C,
            U,
            TAPS,
            SILU,
        )


@triton.jit
def _conv_kernel(
    q,
    q_stride,
    q_scale,
    q_scale_step,
    conv_w,
    conv_w_scale,
    conv_w_scale_step,
    conv_bias,
    state,
    u_scale,
    u_q,
    y,
    C,
    U,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAIN: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = c < C
    scale = tl.load(q_scale + c * q_scale_step, mask=inside, other=1.0)
    taps = load_taps(conv_w, conv_w_scale, conv_w_scale_step, conv_bias, c, inside, TAPS)
    channel_scale = tl.load(u_scale + c, mask=inside & (c < U), other=1.0)
    await_inputs(CHAIN)
    row_state = state + row * ((TAPS - 1) * C)
    history = load_history(row_state, c, inside, C, TAPS)
    newest = tl.load(q + row * q_stride + c, mask=inside, other=0)
    conv_step(
        newest,
        scale,
        history,
        taps,
        row_state,
        channel_scale,
        u_q + row * U,
        y + row * (C - U),
        c,
        inside,
        C,
        U,
        TAPS,
        SILU,
    )


def in_proj_conv_step(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
    conv_start: int,
    conv_w_q: Tensor,
    conv_w_scale: Tensor,
    conv_bias: Tensor | None,
    state_q: Tensor,
    activation: str,
    u_scale: Tensor,
    *,
    block_n: int | None = None,
    num_warps: int | None = None,
    maxnreg: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kernel of `ssmc.ops.in_proj_conv_step`; the new state is written over state_q.

    Norm, product and convolution are kernels of their own where `matvec` has no tiles.
    """
    if activation not in ACTIVATIONS:
        raise UsageError(f"in_proj_conv_step: unknown activation '{activation}'")
    flat = row_view(x)
    m, n, channels, width = flat.shape[0], w_q.shape[0], conv_w_q.shape[0], u_scale.numel()
    piece = piece_of(x.shape[-1])
    how = matvec(w_q, w_scale, m, piece, block_n, num_warps, maxnreg)
    u_q = torch.empty((*x.shape[:-1], width), dtype=torch.int8, device=x.device)
    y = torch.empty((*x.shape[:-1], channels - width), device=x.device)
    conv = (conv_w_q, conv_w_scale, int(conv_w_scale.numel() > 1), conv_bias, state_q, u_scale)
    shape = {"TAPS": conv_w_q.shape[1], "SILU": activation == "silu"}
    if how is None:
        from ssmc.kernels.matmul import int8_linear_quantize
        from ssmc.kernels.norm import rms_norm_quantize

        q = int8_linear_quantize(
            *rms_norm_quantize(x, norm_weight, eps), w_q, w_scale, bias, out_scale
        )
        part = slice(conv_start, conv_start + channels)
        launch(
            _conv_kernel,
            (triton.cdiv(channels, BLOCK_C), m),
            row_view(q)[:, part],
            n,
            out_scale[part] if out_scale.numel() > 1 else out_scale,
            int(out_scale.numel() > 1),
            *conv,
            u_q,
            y,
            channels,
            width,
            device=x.device,
            BLOCK=BLOCK_C,
            **shape,
        )
        return q, u_q, y, state_q
    q = torch.empty((*x.shape[:-1], n), dtype=torch.int8, device=x.device)
    held = matvec_int4.held(w_q, w_scale)
    launch(
        matvec_int4.in_proj_kernel if held else _in_proj_kernel,
        (triton.cdiv(n, held.rows if held else how.block_n),),
        flat,
        flat.stride(0),
        norm_weight,
        eps,
        m,
        matvec_int4.descriptor(w_q, held) if held else w_q.view(torch.int32),
        w_scale,
        int(w_scale.numel() > 1),
        bias,
        out_scale,
        int(out_scale.numel() > 1),
        conv_start,
        *conv,
        q,
        u_q,
        y,
        n,
        channels,
        width,
        device=x.device,
        **shape,
        **(held.constants() if held else {"PIECE": piece, **how.constants()}),
    )
    return q, u_q, y, state_q
