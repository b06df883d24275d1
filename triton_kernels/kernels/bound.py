"""Computes the shift that all lines of a softmax sweep share, in log2 units, on the device.

If all lines share one shift m, one `exp2(logit - m)` serves both the row and the column of a pair.
m is chosen so that the exponential of the largest possible logit is 2^above, with `above` between 0
and 100 (`shift_kernel`): high enough to keep the sum of the smallest row within the range of fp32,
low enough for a sum over 2^27 columns not to overflow.
"""

import triton
import triton.language as tl

from ..constants import LOG2E


@triton.jit(do_not_specialize=["M", "N"])
def longest_kernel(
    X, Y, SQUARES, M, N, D, stride_x, stride_y, ROWS: tl.constexpr, BK: tl.constexpr
):
    """Stores the largest squared norm of each ROWS rows, those of x first, then those of y. M or N
    is 0 if that tower's norms are not needed. An overflow stores infinity: one shift is then not
    enough, and the sweep's states show it."""
    programs_of_x = tl.cdiv(M, ROWS)
    features, first, count, stride = X, tl.program_id(0), M, stride_x
    if tl.program_id(0) >= programs_of_x:
        features, first, count, stride = Y, tl.program_id(0) - programs_of_x, N, stride_y
    i = first * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BK)
    at = features + i.to(tl.int64)[:, None] * stride + k[None, :]
    square = tl.zeros((ROWS, BK), tl.float32)
    for start in range(0, D, BK):
        a = tl.load(at, mask=(i < count)[:, None] & (start + k < D)[None, :], other=0.0)
        square += a.to(tl.float32) * a.to(tl.float32)
        at += BK
    tl.store(SQUARES + tl.program_id(0), tl.max(tl.sum(square, 1), 0))


@triton.jit
def _largest(SQUARES, count, LANES: tl.constexpr):
    """Returns the largest norm."""
    lane = tl.arange(0, LANES)
    square = tl.zeros((LANES,), tl.float32)
    for start in range(0, count, LANES):
        here = tl.load(SQUARES + start + lane, mask=start + lane < count, other=0.0)
        square = tl.maximum(square, here)
    return tl.sqrt(tl.max(square, 0)).to(tl.float64)


@triton.jit(do_not_specialize=["count_x", "count_y"])
def shift_kernel(
    BOUND, SQUARES, SCALE, LARGEST_BIAS, SHIFT, KEPT_SHIFT, FLAG, count_x, count_y,
    LANES: tl.constexpr,
):  # fmt: skip
    """Stores m, computed from |t| <= BOUND if BOUND is given, else from the norms in SQUARES, which
    leaves out towers with factors: normalised features have norm 1. Clears the flag that requests
    the sweep with running maxima."""
    largest = tl.full((), 1.0, tl.float64)
    if BOUND is not None:
        largest *= tl.load(BOUND).to(tl.float64)
    if SQUARES is not None:
        if count_x > 0:
            largest *= _largest(SQUARES, count_x, LANES)
        if count_y > 0:
            largest *= _largest(SQUARES + count_x, count_y, LANES)
    # The factor 1 + 1e-5 covers the rounding of norms and products.
    top = tl.abs(tl.load(SCALE).to(tl.float64)) * largest * (LOG2E * (1 + 1e-5))
    above = tl.minimum(tl.maximum(2 * top - 120, 0.0), 100.0)
    if LARGEST_BIAS is not None:  # of columns, in log2 units
        top += tl.load(LARGEST_BIAS)
    # Shifts are integers, so that changing from one to another multiplies by a power of two, which
    # is exact. Beyond 2^24 fp32 would round a shift, but there one shift is not enough anyway.
    shift = tl.ceil(top - above).to(tl.float32)
    tl.store(SHIFT, shift)
    if KEPT_SHIFT is not None:
        tl.store(KEPT_SHIFT, shift.to(tl.float64))
    tl.store(FLAG, 0)
