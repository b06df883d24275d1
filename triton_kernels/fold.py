"""The first sweep: a tile is made, folded into one number for each of its rows and columns, and
forgotten.

`sweep_kernel` has one reference for all pairs, so one exponential serves row and column.
`maxima_kernel` is launched after it, always, and returns at once unless the flag says that this
was too coarse: then it gives every row and column of a tile the reference that its largest logit
asks for. The host never learns which of them did the work.

Both write partials, a number for each (line, tile) pair: rows first, (tiles_n, M), then columns,
(tiles_m, N). `finalise.py` adds them up in a fixed order.

More run-time parameters than fifteen: they are a block of logits, and every launch takes one.
"""

import triton
import triton.language as tl

from .epilogues import affine, logit
from .tile import has_positives, negatives, normalised, position, product


@triton.jit
def store_lines(PARTIAL, rows, columns, pid_m, pid_n, i, j, M, N, BN: tl.constexpr):
    row = PARTIAL + pid_n.to(tl.int64) * M
    column = PARTIAL + tl.cdiv(N, BN).to(tl.int64) * M + pid_m.to(tl.int64) * N
    tl.store(row + i, rows, mask=i < M)
    tl.store(column + j, columns, mask=j < N)


@triton.jit
def fold_tile(
    t, k, m, i, j, pid_m, pid_n, POSITIVE, PARTIAL, M, N, offset, BN: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """Positives and partial sums of a tile whose lines share the reference m."""
    if has_positives(i, j, offset):
        j_of_row = i + offset
        here = (j_of_row >= tl.min(j, 0)) & (j_of_row <= tl.max(j, 0)) & (j_of_row < N)
        positive = tl.sum(tl.where(j_of_row[:, None] == j[None, :], t, 0.0), 1)
        tl.store(POSITIVE + i, positive.to(tl.float64), mask=here & (i < M))
    e = tl.where(negatives(i, j, M, N, offset), FOLD(t, k, m), 0.0)
    store_lines(PARTIAL, tl.sum(e, 1), tl.sum(e, 0), pid_m, pid_n, i, j, M, N, BN)


@triton.jit(do_not_specialize=["M", "N", "offset", "kept_rows"])
def sweep_kernel(
    X, Y, FX, FY, SCALE, BIAS, REFERENCE, POSITIVE, KEPT, PARTIAL, M, N, D, stride_x, stride_y,
    stride_kept, offset, kept_rows, FOLD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = position(tl.program_id(0), M, N, BM, BN, GROUP)
    i, j = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN)
    t = product(X, Y, i, j, M, N, D, stride_x, stride_y, BK, EVEN, PRECISION, UNIT)
    t = normalised(t, FX, FY, i, j, M, N)
    if KEPT is not None:
        kept = KEPT + i.to(tl.int64)[:, None] * stride_kept + j[None, :]
        tl.store(kept, t, mask=(i < tl.minimum(M, kept_rows))[:, None] & (j < N)[None, :])
    m = 0.0
    if REFERENCE is not None:
        m = tl.load(REFERENCE)
    k = affine(SCALE, BIAS)
    fold_tile(t, k, m, i, j, pid_m, pid_n, POSITIVE, PARTIAL, M, N, offset, BN, FOLD)


@triton.jit
def _reference_of_lines(x, DIM: tl.constexpr):
    """The least integer above the largest logit of each line; -inf for one without negatives."""
    return tl.ceil(tl.max(x, DIM))


@triton.jit
def _usable(reference):
    return tl.where(reference == float("-inf"), 0.0, reference)


@triton.jit(do_not_specialize=["M", "N", "offset"])
def maxima_kernel(
    X, Y, FX, FY, SCALE, BIAS, FLAG, PARTIAL, M, N, D, stride_x, stride_y, offset,
    FOLD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Partial sums, and behind them, in the same layout, the references that they are relative to.

    Fewer programs than tiles, since as a rule all they do is return.
    """
    if tl.load(FLAG) == 0:
        return
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        pid_m, pid_n = position(tile, M, N, BM, BN, GROUP)
        i, j = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN)
        t = product(X, Y, i, j, M, N, D, stride_x, stride_y, BK, EVEN, PRECISION, UNIT)
        t = normalised(t, FX, FY, i, j, M, N)
        k = affine(SCALE, BIAS)
        live = negatives(i, j, M, N, offset)
        x = tl.where(live, logit(t, k), float("-inf"))
        row, column = _reference_of_lines(x, 1), _reference_of_lines(x, 0)
        rows = tl.sum(tl.where(live, FOLD(t, k, _usable(row)[:, None]), 0.0), 1)
        columns = tl.sum(tl.where(live, FOLD(t, k, _usable(column)[None, :]), 0.0), 0)
        store_lines(PARTIAL, rows, columns, pid_m, pid_n, i, j, M, N, BN)
        references = PARTIAL + tl.cdiv(N, BN).to(tl.int64) * M + tl.cdiv(M, BM).to(tl.int64) * N
        store_lines(references, row, column, pid_m, pid_n, i, j, M, N, BN)
