import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssmc.errors import UsageError
from ssmc.quant.formats import (
    SMALLEST_SCALE,
    bf16_up,
    columns_packed,
    dequantize_tensor,
    pack,
    qmax,
    quantize_tensor,
    quantize_weight,
    scale_for,
    unpack,
)

BF16_MAX = torch.finfo(torch.bfloat16).max
POSITIVE = st.floats(min_value=2.0**-149, max_value=BF16_MAX, width=32, allow_subnormal=True)
RANGES = st.floats(min_value=2.0**-100, max_value=2.0**100, width=32)
BITS = st.integers(2, 8)
FRACTIONS = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=32)


def below(bf16: float) -> float:
    """The next smaller bfloat16 of a positive one."""
    pattern = torch.tensor(bf16, dtype=torch.float32).view(torch.int32)
    return (pattern - 0x10000).view(torch.float32).item()


@given(POSITIVE)
def test_bf16_up_is_the_smallest_bfloat16_not_below(x: float) -> None:
    up = bf16_up(torch.tensor(x))
    assert up.dtype == torch.float32
    assert up.bfloat16().float() == up
    assert below(up.item()) < x <= up.item()


def test_bf16_up_beyond_the_finite_range() -> None:
    x = torch.tensor([BF16_MAX, torch.finfo(torch.float32).max, math.inf, math.nan, 0.0])
    up = bf16_up(x)
    assert up[:3].tolist() == [BF16_MAX, math.inf, math.inf]
    assert up[3].isnan()
    assert up[4] == 0
    assert bf16_up(torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)).isnan()


@given(RANGES, BITS)
def test_the_range_fits_the_integers_and_wastes_little(absmax: float, bits: int) -> None:
    scale = scale_for(torch.tensor(absmax), bits).item()
    # The division by qmax rounds; bfloat16 steps are at most 2^-7.
    assert absmax <= qmax(bits) * scale * (1 + 2**-23)
    assert qmax(bits) * scale <= absmax * (1 + 2**-7) * (1 + 2**-23)


def test_zero_range_has_a_scale_with_a_finite_inverse() -> None:
    scale = scale_for(torch.zeros(3))
    assert torch.all(scale == SMALLEST_SCALE)
    assert scale.reciprocal().isfinite().all()


@given(RANGES, FRACTIONS, BITS)
def test_round_trip_errs_by_half_a_step_at_most(
    absmax: float, fractions: list[float], bits: int
) -> None:
    x = torch.tensor(fractions) * absmax
    scale = scale_for(torch.tensor(absmax), bits)
    error = (dequantize_tensor(quantize_tensor(x, scale, bits), scale).double() - x.double()).abs()
    # The inverse and the product each round: qmax * 2^-23 of a step between them.
    assert error.max() <= scale.double() * (0.5 + qmax(bits) * 2**-23)


@given(RANGES, BITS)
def test_quantising_again_changes_nothing(absmax: float, bits: int) -> None:
    q = torch.arange(-qmax(bits), qmax(bits) + 1, dtype=torch.int8)
    scale = scale_for(torch.tensor(absmax), bits)
    assert torch.equal(quantize_tensor(dequantize_tensor(q, scale), scale, bits), q)


def test_values_outside_the_range_saturate_symmetrically() -> None:
    x = torch.tensor([-math.inf, -1e30, 1e30, math.inf])
    assert quantize_tensor(x, torch.tensor(1.0)).tolist() == [-127, -127, 127, 127]
    assert quantize_tensor(x, torch.tensor(1.0), 4).tolist() == [-7, -7, 7, 7]


@pytest.mark.parametrize("bits", [8, 4])
def test_weight_granularities(bits: int) -> None:
    weight = torch.randn(31, 63) * torch.logspace(-3, 3, 31)[:, None]
    q, scale = quantize_weight(weight, "channel", bits)
    assert (q.dtype, scale.shape) == (torch.int8, (31, 1))
    assert torch.all(q.abs().amax(1) >= qmax(bits) - 1)
    error = (dequantize_tensor(q, scale) - weight).abs() / scale
    assert error.max() <= 0.5 + qmax(bits) * 2**-23
    q, scale = quantize_weight(weight, "tensor", bits)
    assert scale.shape == ()
    assert torch.equal(scale, scale_for(weight.abs().max(), bits))
    assert torch.equal(q, quantize_tensor(weight, scale, bits))


def test_wrong_options() -> None:
    with pytest.raises(UsageError, match="9 bits"):
        qmax(9)
    with pytest.raises(UsageError, match="granularity 'row'"):
        quantize_weight(torch.ones(2, 2), "row")  # type: ignore[arg-type]


@given(BITS, st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_integers_come_back_from_their_bytes(
    bits: int, rows: int, multiple: int, groups: int
) -> None:
    group = multiple * columns_packed(bits)
    limit = 1 << (bits - 1)
    q = torch.randint(-limit, limit, (rows, group * groups), dtype=torch.int8)
    packed = pack(q, bits, group)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, group * groups * bits // 8)  # no bit is wasted
    assert torch.equal(unpack(packed, bits, group), q)


@given(BITS, st.integers(2, 4))
def test_groups_have_bytes_of_their_own(bits: int, groups: int) -> None:
    group = 8 * columns_packed(bits)
    q = torch.randint(-1, 2, (3, group * groups), dtype=torch.int8)
    parts = [pack(part, bits, group) for part in q.split(group, 1)]
    assert torch.equal(pack(q, bits, group), torch.cat(parts, 1))


@given(st.sampled_from([2, 4, 16]))
def test_four_bits_lie_as_kernels_read_them(group: int) -> None:
    q = torch.randint(-8, 8, (3, 2 * group), dtype=torch.int8)
    packed = pack(q, 4, group)
    assert torch.equal(packed[:, 0] & 15, (q[:, 0] + 8).to(torch.uint8))
    assert torch.equal(packed[:, 0] >> 4, (q[:, group // 2] + 8).to(torch.uint8))


@pytest.mark.parametrize(("bits", "columns"), [(2, 4), (3, 8), (4, 2), (5, 8), (6, 4), (8, 1)])
def test_columns_that_fill_whole_bytes(bits: int, columns: int) -> None:
    assert columns_packed(bits) == columns
