"""Splits fp32 numbers into three bfloat16 parts that add up to them, for `split_product.py`.

The three parts of a row lie side by side, each padded with zeros: no step along a row needs a mask,
and a matrix of parts is stored like any other matrix.
"""

import triton
import triton.language as tl

from .tile import stored_as

# bfloat16's largest number. Numbers above it would round to infinity.
LARGEST = tl.constexpr(3.3895313892515355e38)


@triton.jit
def parts_of(x):
    """Returns high, middle and low. Their sum is exact down to bfloat16's least subnormal, 2^-133.
    An infinity has a NaN as its low part, so every product with it is NaN."""
    high = stored_as(tl.minimum(tl.maximum(x, -LARGEST), LARGEST), tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = stored_as(rest, tl.bfloat16)
    low = stored_as(rest - middle.to(tl.float32), tl.bfloat16)
    return high, middle, low


@triton.jit(do_not_specialize=["M"])
def to_parts_kernel(
    X, OUT, M, D, stride_x, WIDTH: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Splits the rows of X (M, D) into the rows of OUT (M, 3 WIDTH)."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = (i < M)[:, None]
    for start in range(0, WIDTH, BK):
        k = (start + tl.arange(0, BK))[None, :]
        x = tl.load(X + i.to(tl.int64)[:, None] * stride_x + k, mask=row & (k < D), other=0.0)
        high, middle, low = parts_of(x)
        out = OUT + i.to(tl.int64)[:, None] * (3 * WIDTH) + k
        mask = row & (k < WIDTH)
        tl.store(out, high, mask=mask)
        tl.store(out + WIDTH, middle, mask=mask)
        tl.store(out + 2 * WIDTH, low, mask=mask)
