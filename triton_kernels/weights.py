"""The second sweep: w_ij = activation(s_ij) * (a_i + b_j) of a tile's negatives, written for two
library products and summed for the gradients of scale and bias.

Positives stay out: theirs is the largest term, and it is added in fp32 (`complete.py`).

What is written is `w_ij * ENLARGED * factor_x_i * factor_y_j`: then the products take the features
as they are, nothing normalised is stored, and what is left is to divide row i of `w @ y` by
factor_x_i, column j of `w.T @ x` by factor_y_j. fp16 has no range for factors (SPREAD off: the
products take normalised copies) and needs ENLARGED instead: weights are at most 2, it would lose
those below 6e-8 and blur those below 6e-5.

More run-time parameters than fifteen: they are a block of logits and its lines' states.
"""

import triton
import triton.language as tl

from .epilogues import affine
from .fold import fold_tile
from .tile import negatives, normalised, position, product, rounded, stored_as


@triton.jit(do_not_specialize=["M"])
def to_tf32_kernel(X, OUT, M, D, stride_x, ROWS: tl.constexpr, BK: tl.constexpr):
    """The operands of a tf32 product. What is rounded once need not be rounded in every tile."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BK)
    for start in range(0, D, BK):
        mask = (i < M)[:, None] & (start + k < D)[None, :]
        x = tl.load(X + i.to(tl.int64)[:, None] * stride_x + start + k[None, :], mask=mask)
        tl.store(OUT + i.to(tl.int64)[:, None] * D + start + k[None, :], rounded(x, 13), mask=mask)


@triton.jit
def weigh_tile(
    t, k, FX, FY, REFERENCE_X, REFERENCE_Y, ONE, A, B, W, i, j, M, N, stride_w, offset,
    SPREAD: tl.constexpr, ENLARGED: tl.constexpr, ACTIVATION: tl.constexpr, IS_TF32: tl.constexpr,
):  # fmt: skip
    """Writes the weights of a tile; returns their sum and that of w * t."""
    row, column = i < M, j < N
    if A is not None:
        a = tl.load(A + i, mask=row, other=0.0).to(tl.float32)[:, None]
        b = tl.load(B + j, mask=column, other=0.0).to(tl.float32)[None, :]
    if A is None:
        w = ACTIVATION(t, k, 0.0)
    elif REFERENCE_X is not None:
        if tl.load(ONE) != 0:
            w = ACTIVATION(t, k, tl.load(REFERENCE_X).to(tl.float32)) * (a + b)
        else:
            m = tl.load(REFERENCE_X + i, mask=row, other=0.0).to(tl.float32)[:, None]
            w = ACTIVATION(t, k, m) * a
            m = tl.load(REFERENCE_Y + j, mask=column, other=0.0).to(tl.float32)[None, :]
            w += ACTIVATION(t, k, m) * b
    else:
        w = ACTIVATION(t, k, 0.0) * (a + b)
    live = negatives(i, j, M, N, offset)
    w = tl.where(live, w, 0.0)
    # Not row by row first: the sum of a sliced layout makes the compiler for sm_100 abort.
    sum_w, sum_wt = tl.sum(w), tl.sum(w * tl.where(live, t, 0.0))
    if W is not None:
        w *= ENLARGED
        if SPREAD:
            w = normalised(w, FX, FY, i, j, M, N)
        if IS_TF32:
            w = rounded(w, 13)
        out = W + i.to(tl.int64)[:, None] * stride_w + j[None, :]
        tl.store(out, stored_as(w, W), mask=row[:, None] & column[None, :])
    return sum_w, sum_wt


# States and coefficients of columns begin at M + column: their alignment would follow the batch.
UNALIGNED = ["REFERENCE_X", "REFERENCE_Y", "A", "B"]


@triton.jit(do_not_specialize=["M", "N", "offset"], do_not_specialize_on_alignment=UNALIGNED)
def weigh_kernel(
    X, Y, FX, FY, SCALE, BIAS, REFERENCE_X, REFERENCE_Y, ONE, A, B, W, TOTALS, POSITIVE, PARTIAL,
    M, N, D, stride_x, stride_y, stride_w, offset, KEPT: tl.constexpr, SPREAD: tl.constexpr,
    ENLARGED: tl.constexpr, FOLD: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """KEPT: X is t as the first sweep kept it, and there is no product. PARTIAL: both sweeps in
    one go. A and B are absent where they add up to 1. ONE: whether all references are equal, so
    that one exponential serves."""
    pid_m, pid_n = position(tl.program_id(0), M, N, BM, BN, GROUP)
    i, j = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN)
    if KEPT:
        t = X + i.to(tl.int64)[:, None] * stride_x + j[None, :]
        t = tl.load(t, mask=(i < M)[:, None] & (j < N)[None, :], other=0.0)
    else:
        t = product(X, Y, i, j, M, N, D, stride_x, stride_y, BK, EVEN, PRECISION, UNIT)
        t = normalised(t, FX, FY, i, j, M, N)
    k = affine(SCALE, BIAS)
    if PARTIAL is not None:
        fold_tile(t, k, 0.0, i, j, pid_m, pid_n, POSITIVE, PARTIAL, M, N, offset, BN, FOLD)
    sum_w, sum_wt = weigh_tile(
        t, k, FX, FY, REFERENCE_X, REFERENCE_Y, ONE, A, B, W, i, j, M, N, stride_w, offset,
        SPREAD, ENLARGED, ACTIVATION, PRECISION == "tf32",
    )  # fmt: skip
    tl.store(TOTALS + tl.program_id(0), sum_w)
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    tl.store(TOTALS + tiles + tl.program_id(0), sum_wt)
