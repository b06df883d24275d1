"""Copies features, rounded to tf32, as operands of tf32 products."""

import triton
import triton.language as tl

from .tile import rounded


@triton.jit(do_not_specialize=["M"])
def to_tf32_kernel(X, OUT, M, D, stride_x, ROWS: tl.constexpr, BK: tl.constexpr):
    """Rounds X (M, D) into OUT once, so that no tile has to round its features."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BK)
    for start in range(0, D, BK):
        mask = (i < M)[:, None] & (start + k < D)[None, :]
        x = tl.load(X + i.to(tl.int64)[:, None] * stride_x + start + k[None, :], mask=mask)
        tl.store(OUT + i.to(tl.int64)[:, None] * D + start + k[None, :], rounded(x, 13), mask=mask)
