"""The one reference of a softmax sweep, in log2 units, made on the device.

`exp2(logit - m)` serves the row and the column of a pair alike if m is one number for all of them.
m puts the largest logit that is possible at 2^top: high enough for the smallest row to stay within
fp32, low enough for a sum over 2^27 columns not to overflow.
"""

import triton
import triton.language as tl

from .epilogues import LOG2E


@triton.jit(do_not_specialize=["M"])
def longest_kernel(X, SQUARES, M, D, stride_x, ROWS: tl.constexpr, BK: tl.constexpr):
    """The largest squared norm of ROWS rows. Infinite where it overflows: then no one reference
    is enough, and the states say so."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BK)
    x = X + i.to(tl.int64)[:, None] * stride_x + k[None, :]
    square = tl.zeros((ROWS, BK), tl.float32)
    for start in range(0, D, BK):
        a = tl.load(x, mask=(i < M)[:, None] & (start + k < D)[None, :], other=0.0)
        square += a.to(tl.float32) * a.to(tl.float32)
        x += BK
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
def reference_kernel(
    BOUND, SQUARES_X, SQUARES_Y, SCALE, REFERENCE, FLAG, count_x, count_y, LANES: tl.constexpr
):
    """m from |t| <= BOUND where one is given, else from norms: those of normalised features are 1.
    Clears the flag that asks for the sweep with running maxima."""
    largest = tl.full((), 1.0, tl.float64)
    if BOUND is not None:
        largest *= tl.load(BOUND).to(tl.float64)
    if SQUARES_X is not None:
        largest *= _largest(SQUARES_X, count_x, LANES)
    if SQUARES_Y is not None:
        largest *= _largest(SQUARES_Y, count_y, LANES)
    # The margin covers the rounding of norms and products.
    top = tl.abs(tl.load(SCALE).to(tl.float64)) * largest * (LOG2E * (1 + 1e-5))
    above = tl.minimum(tl.maximum(2 * top - 120, 0.0), 100.0)
    # Integral, so that powers of two relate it to any other reference. Beyond 2^24 it rounds: there
    # no one reference is enough.
    tl.store(REFERENCE, tl.ceil(top - above).to(tl.float32))
    tl.store(FLAG, 0)
