"""The scan of Mamba-2 over a prompt on Hopper's asynchronous tensor cores, in Gluon.

The kernels of a segment in `ssmc.kernels.ssd_scan`, forwards, for 64 or 128 states and heads of
whole parts of 64 channels, which lie side by side. All that a chunk takes is copied by the tensor
memory accelerator while the chunk in front of it is worked on, and of the two programs of a
multiprocessor one makes the operands of products while those of the other are multiplied.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ssmc.kernels.launch import await_inputs, launch
from ssmc.kernels.ssd_chunks import Chunks
from ssmc.kernels.ssd_operands import HALF_LIMIT, QMAX, SMALL, fast_exp2, to_half

CHUNK, CHANNELS, WARPS = 64, 64, 4
_ALIGNED = 16  # bytes that what the accelerator copies begins at multiples of
_GROWTH = gl.constexpr(CHUNK * QMAX.value * QMAX.value)
_MARGIN = gl.constexpr(256.0)


def fits(x_q: Tensor, RANK: int, forms: tuple[str, ...], reverse: bool) -> bool:
    """Whether these kernels take x [B, L, H, P], so many states and such forms of x, B and C."""
    batch, length, heads, width = x_q.shape
    steps = [step for n, step in zip(x_q.shape[:2], x_q.stride(), strict=False) if n > 1]
    aligned = all(n % _ALIGNED == 0 for n in (x_q.data_ptr(), *steps))
    together = width % CHANNELS == 0 and (heads == 1 or x_q.stride(2) == width)
    sizes = RANK in (64, 128) and batch * length > 0
    return sizes and aligned and together and forms == ("column", "row", "row") and not reverse


def scan(
    x: tuple[Any, ...],
    D: Tensor | None,
    made: Chunks,
    state: Tensor | None,
    sums: Tensor,
    totals: Tensor,
    y: Tensor,
    new_state: Tensor,
    grid: tuple[int, int, int],
    extents: tuple[int, ...],
    split: bool,
) -> None:
    """Write y and the new state; all operands are those of the kernels of a segment."""
    assert made.copies is not None
    q, x_scale, _, x_steps = x
    RANK = made.copies.shape[-1]
    copies = _descriptor(made.copies.view(-1, RANK), CHUNK, RANK)
    weights = _descriptor(made.weights.view(-1), 4 * CHUNK)
    between = _descriptor(made.between.view(-1, CHUNK), CHUNK, CHUNK)
    x_rows = _descriptor(_rows(q), 1, CHUNK, CHANNELS)
    y_rows = _descriptor(y.flatten(2), 1, CHUNK, CHANNELS)
    square = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    how = {"CHUNK": CHUNK, "CHANNELS": CHANNELS, "RANK": RANK, "num_warps": WARPS}
    how |= {"STATE": _product(RANK), "SQUARE": square}
    launch(
        sums_kernel,
        grid,
        *(x_rows, copies, x_scale, x_steps, made.weights, made.sizes, sums, totals, *extents),
        device=y.device,
        SPLIT=split,
        **how,
    )
    launch(
        outputs_kernel,
        grid,
        *(x_rows, copies, x_scale, x_steps, D, weights, made.sizes, between, made.C_sizes),
        *(state, sums, totals, y_rows, new_state, *extents),
        device=y.device,
        OUT=_product(CHUNK),
        **how,
    )


def _rows(x_q: Tensor) -> Tensor:
    """x [B, L, H, P] as [B, L, H P], with steps that a copy may have where there is only one."""
    batch, length, heads, width = x_q.shape
    step = x_q.stride(1) if length > 1 else heads * width
    between_sequences = x_q.stride(0) if batch > 1 else length * step
    return x_q.as_strided((batch, length, heads * width), (between_sequences, step, 1))


def _descriptor(tensor: Tensor, *block: int) -> Any:
    kind = {torch.int8: gl.int8, torch.float16: gl.float16, torch.float32: gl.float32}
    layout = gl.NVMMASharedLayout.get_default_for(list(block), kind[tensor.dtype])
    return TensorDescriptor.from_tensor(tensor, list(block), layout)


def _product(width: int) -> Any:
    """Where a product of so many columns lies in registers, 16 of 64 rows a warp."""
    return gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, width, 16])


@gluon.jit
def _tile(HEIGHT: gl.constexpr, WIDTH: gl.constexpr, SLOTS: gl.constexpr):
    """Places in shared memory for SLOTS operands of products, float16 [HEIGHT, WIDTH]."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HEIGHT, WIDTH], gl.float16)
    return gl.allocate_shared_memory(gl.float16, [SLOTS, HEIGHT, WIDTH], layout)


@gluon.jit
def _places(descriptor, SLOTS: gl.constexpr):
    """Places in shared memory for SLOTS copies."""
    # Gluon knows no starred expressions.
    shape: gl.constexpr = [SLOTS] + descriptor.block_type.shape  # noqa: RUF005
    return gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)


@gluon.jit
def _barriers(COUNT: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=1)
    return bars


@gluon.jit
def _channel_scales(x_scale, x_steps, head, p):
    """The scales of channels p."""
    return gl.load(x_scale + head * x_steps[2] + p * x_steps[3])


@gluon.jit
def _place_split(x_q, until_end, high_tile, low_tile, SQUARE: gl.constexpr, SPLIT: gl.constexpr):
    """x of a chunk as the state takes it: as float16, and what that lacks."""
    CHUNK: gl.constexpr = until_end.shape[0]
    x = to_half(x_q.reshape([CHUNK, x_q.shape[2]]).load(SQUARE))
    weighted = x.to(gl.float32) * until_end[:, None]
    high = weighted.to(gl.float16)
    high_tile.store(high)
    if SPLIT:
        low_tile.store((weighted - high.to(gl.float32)).to(gl.float16))


@gluon.jit
def sums_kernel(
    x, copies, x_scale, x_steps, weights, sizes, sums, totals,
    length, heads, groups, width, rank, share,
    CHUNK: gl.constexpr,
    CHANNELS: gl.constexpr,
    RANK: gl.constexpr,
    SPLIT: gl.constexpr,
    STATE: gl.constexpr,
    SQUARE: gl.constexpr,
    CHAIN: gl.constexpr,
):  # fmt: skip
    """What a segment adds to the state, as `ssmc.kernels.ssd_scan`."""
    row, part, segment = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    rows, segments = gl.num_programs(0), gl.num_programs(2)
    batch, head = row // heads, row % heads
    group = batch * groups + head // (heads // groups)
    chunks = gl.cdiv(length, CHUNK)
    first = segment * share
    end = gl.minimum(first + share, chunks)
    p = part * CHANNELS + gl.arange(0, CHANNELS, layout=gl.SliceLayout(1, STATE))
    n = gl.arange(0, RANK, layout=gl.SliceLayout(0, STATE))
    s = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, SQUARE))
    here = row.to(gl.int64)
    weights += here * chunks * (4 * CHUNK) + 2 * CHUNK + s
    sizes += here * chunks
    plane = rows.to(gl.int64) * chunks
    column = head * width + part * CHANNELS
    channel = _channel_scales(x_scale, x_steps, head, p)
    B_tiles, x_places = _places(copies, 2), _places(x, 2)
    high_tiles = _tile(CHUNK, CHANNELS, 2)
    low_tiles = _tile(CHUNK, CHANNELS, 2) if SPLIT else high_tiles
    x_ready, B_ready = _barriers(2), _barriers(2)
    x_bytes: gl.constexpr = x.block_type.nbytes
    B_bytes: gl.constexpr = copies.block_type.nbytes
    h = gl.zeros([CHANNELS, RANK], gl.float32, STATE)
    total = 0.0
    await_inputs(CHAIN)

    for i in gl.static_range(2):
        mbarrier.expect(x_ready.index(i), x_bytes)
        at = (first + i) * CHUNK
        tma.async_copy_global_to_shared(x, [batch, at, column], x_ready.index(i), x_places.index(i))
    mbarrier.expect(B_ready.index(0), B_bytes)
    at = (group * chunks + first) * (2 * CHUNK)
    tma.async_copy_global_to_shared(copies, [at, 0], B_ready.index(0), B_tiles.index(0))
    until_end = gl.load(weights + first * (4 * CHUNK))
    mbarrier.wait(x_ready.index(0), 0)
    _place_split(
        x_places.index(0), until_end, high_tiles.index(0), low_tiles.index(0), SQUARE, SPLIT
    )
    until_end = gl.load(weights + gl.minimum(first + 1, chunks - 1) * (4 * CHUNK))
    whole, largest = gl.load(sizes + first), gl.load(sizes + plane + first)
    for chunk in range(first, end):
        k = chunk - first
        slot, phase = k & 1, (k >> 1) & 1
        fence_async_shared()
        tl.debug_barrier()
        ahead = gl.minimum(chunk + 2, chunks - 1)
        next_until_end = gl.load(weights + ahead * (4 * CHUNK))
        behind = gl.minimum(chunk + 1, chunks - 1)
        next_whole, next_largest = gl.load(sizes + behind), gl.load(sizes + plane + behind)
        mbarrier.expect(x_ready.index(slot), x_bytes)
        tma.async_copy_global_to_shared(
            x, [batch, (chunk + 2) * CHUNK, column], x_ready.index(slot), x_places.index(slot)
        )
        mbarrier.expect(B_ready.index(slot ^ 1), B_bytes)
        at = (group * chunks + behind) * (2 * CHUNK)
        tma.async_copy_global_to_shared(
            copies, [at, 0], B_ready.index(slot ^ 1), B_tiles.index(slot ^ 1)
        )
        mbarrier.wait(B_ready.index(slot), phase)
        B = B_tiles.index(slot)
        growing = gl.zeros([CHANNELS, RANK], gl.float32, STATE)
        high = high_tiles.index(slot).permute((1, 0))
        growing = warpgroup_mma(high, B, growing, use_acc=False, is_async=True)
        if SPLIT:
            low = low_tiles.index(slot).permute((1, 0))
            growing = warpgroup_mma(low, B, growing, is_async=True)
        grown, remains = channel * (largest * (1 / 256)), gl.exp2(whole)
        total += whole
        other = slot ^ 1
        mbarrier.wait(x_ready.index(other), ((k + 1) >> 1) & 1)
        _place_split(
            x_places.index(other), until_end, high_tiles.index(other), low_tiles.index(other),
            SQUARE, SPLIT,
        )  # fmt: skip
        until_end, whole, largest = next_until_end, next_whole, next_largest
        growing = warpgroup_mma_wait(0, deps=[growing])
        h = gl.fma(growing, grown[:, None] + gl.zeros_like(h), h * remains)
    # The copies asked for beyond the end are to have arrived.
    k = end - first
    mbarrier.wait(B_ready.index(k & 1), (k >> 1) & 1)
    mbarrier.wait(x_ready.index((k + 1) & 1), ((k + 1) >> 1) & 1)
    here = here * segments + segment
    sums += here * width * RANK + p[:, None] * RANK + n[None, :]
    gl.store(sums, h)
    gl.store(totals + here, total)


@gluon.jit
def _sizes(sizes, C_sizes, plane, chunk):
    """Of a chunk: the logarithm of its decay, its largest weight, the largest scale of C."""
    whole, largest = gl.load(sizes + chunk), gl.load(sizes + plane + chunk)
    return whole, largest, gl.load(C_sizes + chunk)


@gluon.jit
def _state_scales(reach, channel, largest, chunks):
    """The scales of the state's channels: those of x, except where the state is far above.

    It reaches up to `reach` in a channel; far is _MARGIN times what a chunk can add. So no channel,
    were its scale zero, makes the bound on all so large that float16 in its unit loses what the
    others add. `largest` are pointers to the largest weights of the chunks.
    """
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    number = gl.arange(0, 128, layout=LINE)
    found = gl.zeros([128], gl.float32, LINE)
    for start in range(0, chunks, 128):
        inside = start + number < chunks
        found = gl.maximum(found, gl.load(largest + start + number, mask=inside, other=0.0))
    most = gl.max(found, 0) * (_GROWTH * _MARGIN)
    return gl.maximum(gl.maximum(gl.abs(channel), reach / most), SMALL)


@gluon.jit
def _step(known, bound, skip, RANK: gl.constexpr):
    """How the state goes through a chunk, its unit before and behind being 2^-15 of the bound.

    The bound behind it, what becomes of the state before it and of `until_end` in the new unit,
    the largest of the weights of the positions in one another, and a unit for these, a bound on
    them and 2^-15 of D.
    """
    whole, largest, C_size = known
    decayed = bound * gl.exp2(whole)
    new_bound = decayed + largest * _GROWTH
    inverse = 1.0 / new_bound
    size = C_size * (largest * (RANK / 2.0))
    gain = gl.maximum(gl.maximum(size, SMALL), gl.abs(skip) * (1 / HALF_LIMIT))
    return new_bound, decayed * inverse, largest * (HALF_LIMIT / 256) * inverse, size, gain


@gluon.jit
def _weigh(
    products, kept, whole, size, gain, skip,
    CHUNK: gl.constexpr,
    SQUARE: gl.constexpr,
    DIAGONAL: gl.constexpr,
):  # fmt: skip
    """Weights of positions in one another [T, T] in units of `gain`, as float16."""
    down: gl.constexpr = gl.SliceLayout(1, SQUARE)
    across: gl.constexpr = gl.SliceLayout(0, SQUARE)
    since_t = kept.slice(0, CHUNK).load(down) - gl.maximum(whole, 0.0)
    since_s = kept.slice(0, CHUNK).load(across)
    within = kept.slice(CHUNK, CHUNK).load(across) * (size / gain)
    # The exponents of what counts are never above zero.
    decay = fast_exp2(gl.minimum(since_t[:, None] - since_s[None, :], 0.0))
    weight = (products.to(gl.float32) * within[None, :]) * decay
    if DIAGONAL:
        t, s = gl.arange(0, CHUNK, layout=down), gl.arange(0, CHUNK, layout=across)
        weight = gl.where(t[:, None] == s[None, :], weight + skip / gain, weight)
    return weight.to(gl.float16)


@gluon.jit
def _ask_first(
    x, weights, between, places, ready, batch, row, group, chunk, chunks, slot, column,
    CHUNK: gl.constexpr,
):  # fmt: skip
    """Begin to copy x, the weights and C B' of a chunk."""
    x_place, weight_places, between_place = places
    size: gl.constexpr = x.block_type.nbytes + weights.block_type.nbytes + between.block_type.nbytes
    mbarrier.expect(ready, size)
    tma.async_copy_global_to_shared(x, [batch, chunk * CHUNK, column], ready, x_place)
    at = (row * chunks + chunk) * (4 * CHUNK)
    tma.async_copy_global_to_shared(weights, [at], ready, weight_places.index(slot))
    at = (group * chunks + chunk) * CHUNK
    tma.async_copy_global_to_shared(between, [at, 0], ready, between_place)


@gluon.jit
def _ask_rows(copies, B_place, C_place, ready, group, chunk, chunks, CHUNK: gl.constexpr):
    """Begin to copy B and C of a chunk."""
    mbarrier.expect(ready, 2 * copies.block_type.nbytes)
    at = (group * chunks + chunk) * (2 * CHUNK)
    tma.async_copy_global_to_shared(copies, [at, 0], ready, B_place)
    tma.async_copy_global_to_shared(copies, [at + CHUNK, 0], ready, C_place)


@gluon.jit
def outputs_kernel(
    x, copies, x_scale, x_steps, D, weights, sizes, between, C_sizes, state, sums, totals, y,
    new_state, length, heads, groups, width, rank, share,
    CHUNK: gl.constexpr,
    CHANNELS: gl.constexpr,
    RANK: gl.constexpr,
    STATE: gl.constexpr,
    OUT: gl.constexpr,
    SQUARE: gl.constexpr,
    CHAIN: gl.constexpr,
):  # fmt: skip
    """y of a segment, as `ssmc.kernels.ssd_scan`: the transposed of it, channels along the rows.

    So the state, which the tensor cores leave in registers, is there as an operand of theirs. It is
    kept as bounded by 2^15, in units of that part of `bound`, and of `scale` for each channel.
    """
    row, part, segment = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    rows, segments = gl.num_programs(0), gl.num_programs(2)
    batch, head = row // heads, row % heads
    group = batch * groups + head // (heads // groups)
    chunks = gl.cdiv(length, CHUNK)
    first = segment * share
    end = gl.minimum(first + share, chunks)
    here = row.to(gl.int64)
    plane = rows.to(gl.int64) * chunks
    sizes += here * chunks
    C_sizes += group * chunks
    totals += here * segments
    n = gl.arange(0, RANK, layout=gl.SliceLayout(0, STATE))
    p = part * CHANNELS + gl.arange(0, CHANNELS, layout=gl.SliceLayout(1, STATE))
    sums += here * segments * width * RANK + p[:, None] * RANK + n[None, :]
    cell = (here * width + p)[:, None] * rank + n[None, :]
    in_cell = (p < width)[:, None] & (n < rank)[None, :]
    column = head * width + part * CHANNELS

    channel = _channel_scales(x_scale, x_steps, head, p)
    skip = 0.0
    if D is not None:
        skip = gl.load(D + head)
    B_tile, C_tile = _places(copies, 1).index(0), _places(copies, 1).index(0)
    places = (_places(x, 1).index(0), _places(weights, 2), _places(between, 1).index(0))
    # Where x has been multiplied, y may lie.
    y_place = _places(y, 1).index(0)
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CHUNK, CHANNELS], gl.float16)
    x_tiles = y_place._reinterpret(gl.float16, [2, CHUNK, CHANNELS], tile)
    x_tile, grown_tile = x_tiles.index(0), x_tiles.index(1)
    weight_tile = _tile(CHUNK, CHUNK, 1).index(0)
    first_ready, rows_ready = _barriers(1).index(0), _barriers(1).index(0)
    h = gl.zeros([CHANNELS, RANK], gl.float32, STATE)
    if state is not None:
        h = gl.load(state + cell, mask=in_cell, other=0.0).to(gl.float32)
    await_inputs(CHAIN)

    _ask_first(
        x, weights, between, places, first_ready, batch, row, group, first, chunks, 0, column, CHUNK
    )
    _ask_rows(copies, B_tile, C_tile, rows_ready, group, first, chunks, CHUNK)
    for earlier in range(segment):
        h = h * gl.exp2(gl.load(totals + earlier)) + gl.load(sums + earlier * width * RANK)
    if segment == segments - 1:
        new = h * gl.exp2(gl.load(totals + segment)) + gl.load(sums + segment * width * RANK)
        gl.store(new_state + cell, new.to(new_state.dtype.element_ty), mask=in_cell)
    reach = gl.max(gl.abs(h), 1)
    scale = _state_scales(reach, channel, sizes + plane + first, end - first)
    ratio = gl.convert_layout((channel / scale).to(gl.float16), gl.SliceLayout(0, SQUARE))
    bound = gl.maximum(gl.max(reach / scale, 0), SMALL)
    h = h * (1.0 / scale)[:, None] * (HALF_LIMIT / bound)

    known = _sizes(sizes, C_sizes, plane, first)
    for chunk in range(first, end):
        k = chunk - first
        ahead = gl.minimum(chunk + 1, chunks - 1)
        whole = known[0]
        new_bound, remains, grows, size, gain = _step(known, bound, skip, RANK)
        mbarrier.wait(first_ready, k & 1)
        kept = places[1].index(k & 1)
        products = places[2].load(SQUARE)
        weight = _weigh(products, kept, whole, size, gain, skip, CHUNK, SQUARE, D is not None)
        weight_tile.store(weight)
        x_t = to_half(places[0].reshape([CHUNK, CHANNELS]).load(SQUARE))
        until_end = kept.slice(2 * CHUNK, CHUNK).load(gl.SliceLayout(1, SQUARE)) * grows
        # y of the chunk in front is to have left.
        tma.store_wait(0)
        tl.debug_barrier()
        x_tile.store(x_t)
        grown_tile.store(x_t * until_end.to(gl.float16)[:, None] * ratio[None, :])
        rounded = gl.convert_layout(h.to(gl.float16), gl.DotOperandLayout(0, OUT, 2))
        h = h * remains
        fence_async_shared()
        tl.debug_barrier()

        _ask_first(
            x, weights, between, places, first_ready, batch, row, group, ahead, chunks,
            (k + 1) & 1, column, CHUNK,
        )  # fmt: skip
        known = _sizes(sizes, C_sizes, plane, ahead)
        mbarrier.wait(rows_ready, k & 1)
        zeros = gl.zeros([CHANNELS, CHUNK], gl.float32, OUT)
        C_t, weight_t = C_tile.permute((1, 0)), weight_tile.permute((1, 0))
        passed = warpgroup_mma(rounded, C_t, zeros, use_acc=False, is_async=True)
        inside = warpgroup_mma(
            x_tile.permute((1, 0)), weight_t, zeros, use_acc=False, is_async=True
        )
        h = warpgroup_mma(grown_tile.permute((1, 0)), B_tile, h, is_async=True)
        to_passed = gl.convert_layout(scale * (bound * (1 / HALF_LIMIT)), gl.SliceLayout(1, OUT))
        to_inside = gl.convert_layout(channel * gain, gl.SliceLayout(1, OUT))
        reading = kept.slice(3 * CHUNK, CHUNK).load(gl.SliceLayout(0, OUT))
        passed, inside, h, rounded = warpgroup_mma_wait(0, deps=[passed, inside, h, rounded])
        tl.debug_barrier()

        _ask_rows(copies, B_tile, C_tile, rows_ready, group, ahead, chunks, CHUNK)
        passed *= reading[None, :]
        to_passed = to_passed[:, None] + gl.zeros_like(passed)
        result = gl.fma(passed, to_passed, inside * to_inside[:, None])
        y_place.reshape([CHUNK, CHANNELS]).permute((1, 0)).store(result)
        fence_async_shared()
        tl.debug_barrier()
        tma.async_copy_shared_to_global(y, [batch, chunk * CHUNK, column], y_place)
        bound = new_bound
    # The copies asked for beyond the end are to have arrived.
    k = end - first
    mbarrier.wait(first_ready, k & 1)
    mbarrier.wait(rows_ready, k & 1)
    tma.store_wait(0)
