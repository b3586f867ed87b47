"""Asking for constants before they are needed: nothing is read, so nothing has to be awaited."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prefetch(pointers):
    """Bring the sectors of 32 bytes pointed at into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch_rows(matrix, row, count, width, ROWS: tl.constexpr, ENABLED: tl.constexpr):
    """Bring rows row .. row + ROWS of a contiguous byte matrix [count, width] into the L2 cache.

    `width` is a multiple of 64 bytes and the matrix aligned to 16. ENABLED says that the device has
    the instruction (compute capability 9).
    """
    if ENABLED:
        PIECES: tl.constexpr = 4
        line = tl.minimum(row + tl.arange(0, ROWS), count - 1).to(tl.int64)
        piece = tl.arange(0, PIECES)
        address = matrix + line[:, None] * width + piece[None, :] * (width // PIECES)
        size = tl.full((ROWS, PIECES), 0, tl.int32) + width // PIECES
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r,l,r",
            [address.to(tl.int64), size],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
