"""One small call of every operator, and of its variants, with odd sizes."""

import torch
from torch import Tensor

from ssmc.ops import quantize_dynamic, quantize_state
from ssmc.quant.formats import quantize_weight
from ssmc.quant.weights import quantize_groups

Sample = tuple[object, ...]


def _int8(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def _scan_operands(batch: int, length: int, width: int, rank: int) -> tuple[Tensor, ...]:
    u, dt, z = torch.randn(3, batch, length, width)
    B, C = torch.randn(2, batch, length, rank)
    return u, dt, -torch.rand(width, rank), B, C, torch.randn(width), z


def samples() -> list[tuple[str, Sample]]:
    """(operator, positional arguments) pairs."""
    x = torch.randn(2, 5, 12)
    weight, bias = torch.randn(7, 12), torch.randn(7)
    taps, history = torch.randn(12, 4), torch.randn(2, 3, 12)
    gamma, scale = torch.rand(12), torch.rand(12) + 0.1
    return [
        ("linear", (x, weight)),
        ("linear", (x, weight, bias, True)),
        ("embedding", (torch.randint(7, (2, 5)), weight)),
        ("layer_norm", (x,)),
        ("layer_norm", (x, gamma, gamma - 1, 1e-6)),
        ("rms_norm", (x,)),
        ("rms_norm", (x, gamma, 1e-6)),
        ("rms_norm_gated", (x, None, gamma)),
        ("rms_norm_gated", (x, torch.randn_like(x), gamma, 1e-6, 4, True)),
        ("causal_conv1d", (x, taps)),
        ("causal_conv1d", (x, taps, gamma, history, "silu", True)),
        ("causal_conv1d", (x[:, :1], taps, None, history)),
        ("causal_conv1d", (x, taps[:, :1])),
        ("hadamard", (x, 12)),
        ("hadamard", (x, 4)),
        ("quantize", (x, scale)),
        ("quantize", (x, scale.sum(), 4)),
        ("quantize_dynamic", (x,)),
        ("dequantize", (_int8(2, 5, 12), scale)),
        *_scans(),
        *_states(),
        *_attentions(),
        *_experts(x),
        *_int8_samples(x, weight, bias, taps),
        *_int4_samples(x, weight, bias),
        *_fused_samples(x, weight, bias, gamma, scale),
        *_fused_convolutions(x, taps, gamma),
        *_steps(x[:, :1], weight, bias, gamma),
    ]


def _scans() -> list[tuple[str, Sample]]:
    u, dt, A, B, C, D, z = _scan_operands(2, 5, 6, 3)
    x, state = torch.randn(2, 5, 4, 3), torch.randn(2, 4, 3, 7)
    steps, decay = torch.randn(2, 5, 4), -torch.rand(4)
    B2, C2 = torch.randn(2, 2, 5, 2, 7)
    return [
        ("selective_scan", (u, dt, A, B, C)),
        ("selective_scan", (u, dt, A, B, C, D, z, D, torch.randn(2, 6, 3), True, True)),
        ("ssd_scan", (x, steps, decay, B2, C2)),
        ("ssd_scan", (x, steps, decay, B2, C2, decay, decay, state, 0.1, 1.0, True)),
    ]


def _states() -> list[tuple[str, Sample]]:
    h, count = torch.randn(2, 4, 3, 8), torch.tensor([[3], [4]], dtype=torch.int32)
    pair = quantize_state(h, 4, "decoupled", 8)
    return [
        ("quantize_state", (h, 4, "decoupled", 8, count, 7)),
        ("quantize_state", (h[:, 0, :, 1:], 4, "tensor", 8)),
        ("quantize_state", (h[:, 0], 6, "group", 4)),
        ("dequantize_state", (*pair, "decoupled")),
        ("dequantize_state", (*quantize_state(h, 8, "group", 4), "group")),
        ("dequantize_state", (*quantize_state(h[:, 0], 8, "tensor", 4), "tensor")),
    ]


def _attentions() -> list[tuple[str, Sample]]:
    q, k, v = torch.randn(2, 5, 6, 8), torch.randn(2, 9, 3, 8), torch.randn(2, 9, 3, 7)
    position = torch.tensor([4, 1])
    return [
        ("rotary_embedding", (q, torch.rand(4), position)),
        ("rotary_embedding", (q, torch.rand(3), position, 0.7)),
        ("cache_append", (k, torch.randn(2, 5, 3, 8), position)),
        ("cache_append", (k[:, :, 0, 0], torch.randn(2, 1), position)),
        ("cache_append_step", (k, torch.randn(2, 1, 3, 8), position)),
        (
            "cache_quantize_step",
            (_int8(2, 9, 3, 8), torch.rand(2, 9, 3, 1), q[:, :1, :3], position),
        ),
        ("position_step", (position, 1)),
        ("attention", (q, k, v, position)),
        ("attention", (q[:, :1], k, v, position, 0.3)),
        ("int8_attention", (q, *quantize_dynamic(k), *quantize_dynamic(v), position)),
    ]


def _experts(x: Tensor) -> list[tuple[str, Sample]]:
    weight, index = torch.randn(4, 7, 12), torch.randint(4, (2, 5, 3))
    each = torch.randn(2, 5, 3, 12)
    w_q, w_scale = (t.unflatten(0, (4, 7)) for t in quantize_weight(weight.flatten(0, 1)))
    return [
        ("top_k", (x, 3)),
        ("expert_linear", (x, weight, index)),
        ("expert_linear", (each, weight, index, True)),
        ("int8_expert_linear", (*quantize_dynamic(x), w_q, w_scale, index)),
        ("int8_expert_linear", (*quantize_dynamic(each), w_q, torch.tensor(0.01), index)),
        ("int8_expert_linear_sum", (*quantize_dynamic(each), w_q, w_scale, index, each[..., 0])),
        (
            "int8_expert_linear_sum",
            (*quantize_dynamic(x), w_q, w_scale, index, each[..., 0], x[..., :7]),
        ),
        ("softmax_top_k", (x, 3)),
        ("dequantize_groups", (torch.randint(256, (4, 7, 6)).byte(), torch.rand(4, 7, 2))),
    ]


def _int8_samples(
    x: Tensor, weight: Tensor, bias: Tensor, taps: Tensor
) -> list[tuple[str, Sample]]:
    w_q, w_scale = quantize_weight(weight)
    t_q, t_scale = quantize_weight(taps)
    x_q, x_scale = quantize_dynamic(x)
    one = torch.tensor(0.01)
    u, state = _int8(2, 5, 6), torch.randn(2, 4, 3, 7)
    A, D, B = -torch.rand(6, 3), torch.randn(6), _int8(2, 5, 3)
    heads, decay, B2 = _int8(2, 5, 4, 3), -torch.rand(4), _int8(2, 5, 2, 7)
    scan = (u, one, u, one, A, B, one, B, torch.full((2, 5, 1), 0.02))
    ssd = (heads, one, heads[..., 0], one, decay, B2, one, B2, one)
    return [
        ("int8_linear", (x_q, x_scale, w_q, w_scale, bias)),
        ("int8_embedding", (torch.randint(7, (2, 5)), w_q, w_scale)),
        ("int8_embedding", (torch.randint(7, (2, 5)), w_q, one)),
        ("int8_causal_conv1d", (x_q, one, t_q, t_scale)),
        ("int8_causal_conv1d", (x_q, one, t_q, one, taps[:, 0], x_q[:, :3], "silu")),
        ("int8_selective_scan", scan),
        ("int8_selective_scan", (*scan, D, u, one, D, torch.randn(2, 6, 3), False, True)),
        ("int8_ssd_scan", ssd),
        ("int8_ssd_scan", (*ssd, decay, decay, state, 0.1, 1.0, True)),
        ("int8_ssd_scan_state", (*ssd, None, None, state)),
        ("int8_ssd_scan_state", (*ssd, decay, decay, state, 0.1, 1.0, True)),
    ]


def _int4_samples(x: Tensor, weight: Tensor, bias: Tensor) -> list[tuple[str, Sample]]:
    packed, scale = quantize_groups(weight, 4)
    return [
        ("dequantize_groups", (packed, scale)),
        ("dequantize_groups", (*quantize_groups(weight[:, :8], 8, bits=3), 3, False)),
        ("dequantize_groups", (packed, scale, 4, True)),
        ("int4_linear", (x, packed, scale)),
        ("int4_linear", (x, packed, scale, bias)),
        ("int8_linear", (*quantize_dynamic(x), packed, scale, bias)),
        ("int8_linear_add", (*quantize_dynamic(x), packed, scale, None, torch.randn(2, 5, 7))),
        ("norm_linear_step", (x, None, 1e-5, packed, scale, bias)),
    ]


def _fused_samples(
    x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, scale: Tensor
) -> list[tuple[str, Sample]]:
    linear = (*quantize_dynamic(x), *quantize_weight(weight), bias)
    gate = (_int8(2, 5, 12), scale)
    return [
        ("rms_norm_quantize", (x,)),
        ("rms_norm_quantize", (x, gamma, 1e-6)),
        ("add_rms_norm_quantize", (x, x + 1, gamma)),
        ("hadamard_quantize", (x, 4)),
        ("silu_mul_quantize", (x, x + 1)),
        ("silu_mul_quantize", (x, x - 1, 12)),
        ("gated_norm_quantize", (x, *gate, gamma)),
        ("gated_norm_quantize", (x, *gate, gamma, 1e-6, 6, True, 12)),
        ("int8_linear_add", (*linear, torch.randn(2, 5, 7))),
        ("int8_linear_quantize", (*linear, torch.rand(7) + 0.1)),
        ("int8_linear_split", (*linear, [3, 4])),
    ]


def _fused_convolutions(x: Tensor, taps: Tensor, bias: Tensor) -> list[tuple[str, Sample]]:
    x_q, _ = quantize_dynamic(x)
    conv = (x_q, bias + 0.1, *quantize_weight(taps), bias, _int8(2, 3, 12), "silu")
    return [
        ("int8_causal_conv1d_quantize", (*conv, bias + 0.1)),
        ("int8_causal_conv1d_quantize", (*conv[:4], None, None, "none", bias + 0.1)),
        ("int8_causal_conv1d_split", (*conv, torch.rand(2, 2) + 0.1, 2)),
    ]


def _steps(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor) -> list[tuple[str, Sample]]:
    linear = (*quantize_weight(weight), bias)
    in_proj = (x, gamma, 1e-5, *linear, torch.rand(7) + 0.1)
    taps = quantize_weight(torch.randn(5, 4))
    conv = (2, *taps, bias[:5], _int8(2, 3, 5), "silu")
    return [
        ("norm_linear_step", (x, gamma, 1e-5, *linear)),
        ("in_proj_conv_step", (*in_proj, *conv, torch.rand(5) + 0.1)),
        ("in_proj_conv_step", (*in_proj, *conv, torch.rand(1, 3) + 0.1)),
        *_scan_steps(),
    ]


def _scan_steps() -> list[tuple[str, Sample]]:
    one, D = torch.tensor(0.01), torch.randn(6)
    dt_proj = (*quantize_weight(torch.randn(6, 2)), None, one)
    u, A, state = _int8(2, 1, 6), -torch.rand(6, 3), torch.randn(2, 6, 3)
    scan = (*dt_proj, u, one, A)
    x_proj, norms = torch.randn(2, 1, 8), (None, torch.rand(3), torch.rand(3), 1e-6)
    x, dt, decay = _int8(2, 1, 4, 3), _int8(2, 1, 4), -torch.rand(4)
    ssd = (x, one, dt, one, decay, torch.randn(2, 1, 28), 2)
    return [
        ("normed_selective_scan_step", (x_proj, *norms, *scan, D, u, one, None, state, True)),
        ("selective_scan_step", (x_proj, *scan, D, u, one, D, state, True)),
        ("selective_scan_step", (x_proj, *scan, None, None, None, None, state.bfloat16(), False)),
        ("ssd_scan_step", (*ssd, None, None, torch.randn(2, 4, 3, 7))),
        ("ssd_scan_step", (*ssd, decay, decay, torch.randn(2, 4, 3, 7), 0.1, 1.0)),
    ]
