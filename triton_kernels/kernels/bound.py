"""The one shift of a softmax sweep, in log2 units, made on the device.

`exp2(logit - m)` serves the row and the column of a pair alike if m is one number for all of them.
m puts the largest logit that is possible at 2^top: high enough for the smallest row to stay within
fp32, low enough for a sum over 2^27 columns not to overflow.
"""

import triton
import triton.language as tl

from ..epilogues import LOG2E


@triton.jit(do_not_specialize=["M", "N"])
def longest_kernel(
    X, Y, SQUARES, M, N, D, stride_x, stride_y, ROWS: tl.constexpr, BK: tl.constexpr
):
    """The largest squared norm of ROWS rows of either tower, x first; M or N is 0 where none is
    asked for. Infinite where it overflows: then no one shift is enough, and the states say
    so."""
    programs_of_x = tl.cdiv(M, ROWS)
    features, first, lines, stride = X, tl.program_id(0), M, stride_x
    if tl.program_id(0) >= programs_of_x:
        features, first, lines, stride = Y, tl.program_id(0) - programs_of_x, N, stride_y
    i = first * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BK)
    at = features + i.to(tl.int64)[:, None] * stride + k[None, :]
    square = tl.zeros((ROWS, BK), tl.float32)
    for start in range(0, D, BK):
        a = tl.load(at, mask=(i < lines)[:, None] & (start + k < D)[None, :], other=0.0)
        square += a.to(tl.float32) * a.to(tl.float32)
        at += BK
    tl.store(SQUARES + tl.program_id(0), tl.max(tl.sum(square, 1), 0))


@triton.jit
def _largest(SQUARES, count, LANES: tl.constexpr):
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
    """m from |t| <= BOUND where one is given, else from norms: those of normalised features are 1,
    and there are none of them in SQUARES. Clears the flag that asks for the sweep with running
    maxima."""
    largest = tl.full((), 1.0, tl.float64)
    if BOUND is not None:
        largest *= tl.load(BOUND).to(tl.float64)
    if SQUARES is not None:
        if count_x > 0:
            largest *= _largest(SQUARES, count_x, LANES)
        if count_y > 0:
            largest *= _largest(SQUARES + count_x, count_y, LANES)
    # The margin covers the rounding of norms and products.
    top = tl.abs(tl.load(SCALE).to(tl.float64)) * largest * (LOG2E * (1 + 1e-5))
    above = tl.minimum(tl.maximum(2 * top - 120, 0.0), 100.0)
    if LARGEST_BIAS is not None:  # of columns, in log2 units
        top += tl.load(LARGEST_BIAS)
    # Integral, so that powers of two relate it to any other shift. Beyond 2^24 it rounds: there
    # no one shift is enough.
    shift = tl.ceil(top - above).to(tl.float32)
    tl.store(SHIFT, shift)
    if KEPT_SHIFT is not None:
        tl.store(KEPT_SHIFT, shift.to(tl.float64))
    tl.store(FLAG, 0)
