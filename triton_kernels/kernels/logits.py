"""Turns products of features into logits, and says which pairs count for which lines.

Kernels take all that this needs as one tuple of pointers, LOGITS: factors, scale, biases, ids and
thresholds, at the places named below. An option that a block lacks is None at compile time, and
costs nothing.
"""

import triton
import triton.language as tl

from ..constants import INTERPRETED, LOG2E

FACTOR_X, FACTOR_Y = tl.constexpr(0), tl.constexpr(1)
SCALE, BIAS = tl.constexpr(2), tl.constexpr(3)
# The bias of each column, the common bias included, in log2 units: an integral part, and the rest.
KEY_BIAS, KEY_BIAS_LOW = tl.constexpr(4), tl.constexpr(5)
IDS_X, IDS_Y = tl.constexpr(6), tl.constexpr(7)
THRESHOLD_X, THRESHOLD_Y = tl.constexpr(8), tl.constexpr(9)


@triton.jit
def load_lines(VALUES, i, M, PLAIN: tl.constexpr):
    """Loads one number for each line."""
    if PLAIN:
        return tl.load(VALUES + i)
    else:
        return tl.load(VALUES + i, mask=i < M, other=0)


@triton.jit
def row_values(VALUES, i, M, PLAIN: tl.constexpr):
    """Loads a column of one fp32 number for each row."""
    return load_lines(VALUES, i, M, PLAIN).to(tl.float32)[:, None]


@triton.jit
def column_values(VALUES, j, N, PLAIN: tl.constexpr):
    """Loads a row of one fp32 number for each column."""
    return load_lines(VALUES, j, N, PLAIN).to(tl.float32)[None, :]


@triton.jit
def normalised(t, LOGITS, i, j, M, N, PLAIN: tl.constexpr):
    """Returns t times the factors of its rows i and columns j, if there are any."""
    if LOGITS[FACTOR_X] is not None:
        t *= load_lines(LOGITS[FACTOR_X], i, M, PLAIN)[:, None]
    if LOGITS[FACTOR_Y] is not None:
        t *= load_lines(LOGITS[FACTOR_Y], j, N, PLAIN)[None, :]
    return t


@triton.jit
def fma(a, b, c):
    """Returns a * b + c, rounded once."""
    # The interpreter's tl.fma rounds twice. A product of two floats is exact in float64.
    if INTERPRETED:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def affine(LOGITS):
    """Returns scale and bias in log2 units, each as a float and the rest that it cannot hold.

    Rounding the scale alone would cost 2^-24 relative: at a logit of 144 (scale 100) an error of
    6e-6 in the exponential.
    """
    scale = tl.load(LOGITS[SCALE]).to(tl.float64) * LOG2E
    bias = tl.zeros((), tl.float64)
    if LOGITS[BIAS] is not None:
        bias = tl.load(LOGITS[BIAS]).to(tl.float64) * LOG2E
    high = scale.to(tl.float32)
    bias_high = bias.to(tl.float32)
    low = (scale - high.to(tl.float64)).to(tl.float32)
    bias_low = (bias - bias_high.to(tl.float64)).to(tl.float32)
    return high, low, bias_high, bias_low


@triton.jit
def relative(t, k, m, LOGITS, j, N, PLAIN: tl.constexpr):
    """Returns the logits of columns j in log2 units, less the shift m: a scalar, or one number for
    each row or column. k is the tuple that `affine` returns."""
    # m and the high parts of the columns' biases are integral, and m is subtracted before the first
    # rounding: the error is 2^-24 of the distance from the shift, not of the logit.
    high, low, bias, bias_low = k
    if LOGITS[KEY_BIAS] is not None:
        bias = load_lines(LOGITS[KEY_BIAS], j, N, PLAIN)[None, :]
        bias_low = load_lines(LOGITS[KEY_BIAS_LOW], j, N, PLAIN)[None, :]
        return fma(t, high, bias - m) + fma(t, low, bias_low)
    elif LOGITS[BIAS] is not None:
        return fma(t, high, bias - m) + fma(t, low, bias_low)
    else:
        return fma(t, low, fma(t, high, -m))


@triton.jit
def without_own_positives(i, j, M, N, offset, PLAIN: tl.constexpr):
    """True for the pairs of a block except the own positives."""
    if PLAIN:
        return tl.full((i.shape[0], j.shape[0]), 1, tl.int1)
    else:
        inside = (i < M)[:, None] & (j < N)[None, :]
        return inside & ((i + offset)[:, None] != j[None, :])


@triton.jit
def _same_id(LOGITS, i, j, M, N, PLAIN: tl.constexpr):
    ids_x = load_lines(LOGITS[IDS_X], i, M, PLAIN)[:, None]
    return ids_x == load_lines(LOGITS[IDS_Y], j, N, PLAIN)[None, :]


@triton.jit
def negatives(LOGITS, i, j, M, N, offset, PLAIN: tl.constexpr):
    """True for the pairs that are negatives, before thresholds take them out of lines."""
    is_negative = without_own_positives(i, j, M, N, offset, PLAIN)
    if LOGITS[IDS_X] is not None:
        is_negative = is_negative & (_same_id(LOGITS, i, j, M, N, PLAIN) == 0)
    return is_negative


@triton.jit
def positives(LOGITS, i, j, M, N, offset, PLAIN: tl.constexpr):
    """True for the pairs that are positives by their ids."""
    return without_own_positives(i, j, M, N, offset, PLAIN) & _same_id(LOGITS, i, j, M, N, PLAIN)


@triton.jit
def count_for_rows(is_negative, t, LOGITS, i, M, PLAIN: tl.constexpr):
    """True for the negatives that count for their rows. A NaN counts, and makes its row NaN."""
    if LOGITS[THRESHOLD_X] is not None:
        above = t > load_lines(LOGITS[THRESHOLD_X], i, M, PLAIN)[:, None]
        is_negative = is_negative & (above == 0)
    return is_negative


@triton.jit
def count_for_columns(is_negative, t, LOGITS, j, N, PLAIN: tl.constexpr):
    """True for the negatives that count for their columns."""
    if LOGITS[THRESHOLD_Y] is not None:
        above = t > load_lines(LOGITS[THRESHOLD_Y], j, N, PLAIN)[None, :]
        is_negative = is_negative & (above == 0)
    return is_negative
