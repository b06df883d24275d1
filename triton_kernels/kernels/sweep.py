"""The first sweep: a tile is made, folded into one number for each of its rows and columns, and
forgotten.

`sweep_kernel` has one shift for all pairs, so one exponential serves row and column.
`maxima_kernel` gives every row and column of a tile the shift that its largest logit asks for.
A large block takes the first, and launches the second after it, always: it returns at once unless
the flag says that one shift was too coarse, and the host never learns which of them did the
work. A small block, which waits for launches, takes the second alone.

Both write partials, a number for each (line, tile) pair: rows first, (tiles_n, M), then columns,
(tiles_m, N). `finalise.py` adds them up in a fixed order. Positives by id have layers of partials
of their own, made like those of the negatives. SAME_ID says whether they have: 0, or the sign that
their logits are folded with.

More run-time parameters than fifteen: they are a block of logits, and every launch takes one.
"""

import triton
import triton.language as tl

from .flags import is_set
from .logits import (
    IDS_X,
    THRESHOLD_X,
    affine,
    negatives,
    normalised,
    of_columns,
    of_rows,
    positives,
    relative,
)
from .tile import (
    described_product,
    edge_position,
    in_slices,
    plain_position,
    position,
    product,
    store_positives,
    store_tile,
)


@triton.jit
def store_rows(PARTIAL, rows, pid_n, row, M, BM: tl.constexpr, PLAIN: tl.constexpr):
    at = PARTIAL + pid_n.to(tl.int64) * M + row + tl.arange(0, BM)
    if PLAIN:
        tl.store(at, rows)
    else:
        tl.store(at, rows, mask=row + tl.arange(0, BM) < M)


@triton.jit
def columns_of(pid_m, M, N, BN: tl.constexpr):
    """Returns where the partials of columns in a row of tiles begin: behind those of the rows."""
    return tl.cdiv(N, BN).to(tl.int64) * M + pid_m.to(tl.int64) * N


@triton.jit
def store_columns(COLUMNS, columns, j, N, PLAIN: tl.constexpr):
    if PLAIN:
        tl.store(COLUMNS + j, columns)
    else:
        tl.store(COLUMNS + j, columns, mask=j < N)


@triton.jit
def partials(M, N, BM: tl.constexpr, BN: tl.constexpr):
    """Numbers in one layer of partials."""
    return tl.cdiv(N, BN).to(tl.int64) * M + tl.cdiv(M, BM).to(tl.int64) * N


@triton.jit
def _sweep_slice(t, column, arguments, BM: tl.constexpr, BN: tl.constexpr):
    """Stores what columns remember, and the weights that are kept; returns what rows remember of
    negatives; of positives by id, or a sum of rows of the kept w; and one of w * t."""
    # By number: unpacking would make tensors of the constants.
    row, M, N, offset, layer, LOGITS, POSITIVE = (
        arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5],
        arguments[6],
    )  # fmt: skip
    COLUMNS = arguments[7] + arguments[8]
    KEPT, stride_kept, k, m = arguments[9], arguments[10], arguments[11], arguments[12]
    PLAIN: tl.constexpr = arguments[13]
    DESCRIBED: tl.constexpr = arguments[14]
    FOLD: tl.constexpr = arguments[15]
    ACTIVATION: tl.constexpr = arguments[16]
    SAME_ID: tl.constexpr = arguments[17]
    i, j = row + tl.arange(0, BM), column + tl.arange(0, BN)
    t = normalised(t, LOGITS, i, j, M, N, PLAIN)
    x = relative(t, k, m, LOGITS, j, N, PLAIN)
    by_row = FOLD(x)
    by_column = by_row
    if not PLAIN:
        store_positives(POSITIVE, t, row, column, M, N, offset, BM, BN)
    if not PLAIN or LOGITS[IDS_X] is not None or LOGITS[THRESHOLD_X] is not None:
        live = negatives(LOGITS, i, j, M, N, offset, PLAIN)
        by_column = tl.where(of_columns(live, t, LOGITS, j, N, PLAIN), by_row, 0.0)
        by_row = tl.where(of_rows(live, t, LOGITS, i, M, PLAIN), by_row, 0.0)
    store_columns(COLUMNS, tl.sum(by_column, 0), j, N, PLAIN)
    rows = tl.sum(by_row, 1)
    rows_w, rows_wt = rows, rows
    if SAME_ID != 0:
        same = positives(LOGITS, i, j, M, N, offset, PLAIN)
        e = tl.where(same, FOLD(x * SAME_ID), 0.0)
        store_columns(COLUMNS + layer, tl.sum(e, 0), j, N, PLAIN)
        rows_w = tl.sum(e, 1)
    if KEPT is not None:
        w = ACTIVATION(x)
        if not PLAIN or LOGITS[IDS_X] is not None:
            w, t = tl.where(live, w, 0.0), tl.where(live, t, 0.0)
        store_tile(KEPT, w, row, column, 0, M, N, stride_kept, PLAIN, DESCRIBED, BM, BN)
        store_columns(COLUMNS + layer, tl.sum(w, 0), j, N, PLAIN)
        rows_w = tl.sum(w, 1)
        w *= t
        store_columns(COLUMNS + 2 * layer, tl.sum(w, 0), j, N, PLAIN)
        rows_wt = tl.sum(w, 1)
    return rows, rows_w, rows_wt


@triton.jit
def _sweep_tile(
    pid_m, pid_n, X, Y, LOGITS, k, m, POSITIVE, KEPT, PARTIAL, M, N, D, stride_x, stride_y,
    stride_kept, offset, PLAIN: tl.constexpr, FOLD: tl.constexpr, ACTIVATION: tl.constexpr,
    SAME_ID: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, SLICES: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    row, column = pid_m * BM, pid_n * BN
    if DESCRIBED:
        t = described_product(X, Y, row, column, D, BM, BN, BK, PRECISION, UNIT)
    else:
        t = product(
            X, Y, row, column, M, N, D, stride_x, stride_y, PLAIN, BM, BN, BK, EVEN, PRECISION,
            UNIT,
        )  # fmt: skip
    columns, layer = columns_of(pid_m, M, N, BN), partials(M, N, BM, BN)
    # A variable would make tensors of the constants among them.
    rows, rows_w, rows_wt = in_slices(
        _sweep_slice, t, column,
        (
            row, M, N, offset, layer, LOGITS, POSITIVE, PARTIAL, columns, KEPT, stride_kept, k, m,
            PLAIN, DESCRIBED, FOLD, ACTIVATION, SAME_ID,
        ),
        BM, BN, SLICES,
    )  # fmt: skip
    store_rows(PARTIAL, rows, pid_n, row, M, BM, PLAIN)
    if KEPT is not None or SAME_ID != 0:
        store_rows(PARTIAL + layer, rows_w, pid_n, row, M, BM, PLAIN)
    if KEPT is not None:
        store_rows(PARTIAL + 2 * layer, rows_wt, pid_n, row, M, BM, PLAIN)


@triton.jit(do_not_specialize=["M", "N", "offset", "skipped"])
def sweep_kernel(
    X, Y, LOGITS, SHIFT, KEPT, PARTIAL, M, N, stride_x, stride_y, stride_kept, offset, skipped,
    D: tl.constexpr, FOLD: tl.constexpr, ACTIVATION: tl.constexpr, SAME_ID: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, SLICES: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """The plain tiles. DESCRIBED: X, Y and KEPT are tensor descriptors, and as many programs as the
    card has room for go through the tiles, each reading the next one's features already."""
    m = 0.0
    if SHIFT is not None:
        m = tl.load(SHIFT)
    k = affine(LOGITS)
    if DESCRIBED:
        tiles = (M // BM) * (N // BN - skipped)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            pid_m, pid_n = plain_position(tile, M, N, offset, skipped, BM, BN, GROUP)
            _sweep_tile(
                pid_m, pid_n, X, Y, LOGITS, k, m, None, KEPT, PARTIAL, M, N, D, stride_x, stride_y,
                stride_kept, offset, True, FOLD, ACTIVATION, SAME_ID, BM, BN, BK, EVEN, PRECISION,
                UNIT, SLICES, True,
            )  # fmt: skip
    else:
        pid_m, pid_n = plain_position(tl.program_id(0), M, N, offset, skipped, BM, BN, GROUP)
        _sweep_tile(
            pid_m, pid_n, X, Y, LOGITS, k, m, None, KEPT, PARTIAL, M, N, D, stride_x, stride_y,
            stride_kept, offset, True, FOLD, ACTIVATION, SAME_ID, BM, BN, BK, EVEN, PRECISION, UNIT,
            SLICES, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "N", "offset", "skipped"])
def sweep_edges_kernel(
    X, Y, LOGITS, SHIFT, POSITIVE, KEPT, PARTIAL, M, N, D, stride_x, stride_y, stride_kept,
    offset, skipped, FOLD: tl.constexpr, ACTIVATION: tl.constexpr, SAME_ID: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """The tiles of the edges, a program each."""
    m = 0.0
    if SHIFT is not None:
        m = tl.load(SHIFT)
    k = affine(LOGITS)
    pid_m, pid_n = edge_position(tl.program_id(0), M, N, offset, skipped, BM, BN)
    _sweep_tile(
        pid_m, pid_n, X, Y, LOGITS, k, m, POSITIVE, KEPT, PARTIAL, M, N, D, stride_x, stride_y,
        stride_kept, offset, False, FOLD, ACTIVATION, SAME_ID, BM, BN, BK, EVEN, PRECISION, UNIT,
        SLICES, False,
    )  # fmt: skip


@triton.jit
def _shift_of_lines(x, DIM: tl.constexpr):
    """The least integer above the largest logit of each line; -inf for one without pairs."""
    return tl.ceil(tl.max(x, DIM))


@triton.jit
def _usable(shift):
    return tl.where(shift == float("-inf"), 0.0, shift)


@triton.jit
def _store_maxima(
    PARTIAL, by_row, by_column, t, k, LOGITS, pid_m, pid_n, M, N, FOLD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Two layers of partials of a tile: sums over the pairs that count, and their shifts."""
    row = pid_m * BM
    j = pid_n * BN + tl.arange(0, BN)
    x = relative(t, k, 0.0, LOGITS, j, N, False)
    shift = _shift_of_lines(tl.where(by_row, x, float("-inf")), 1)
    other = _shift_of_lines(tl.where(by_column, x, float("-inf")), 0)
    # Chosen after the exponential: what does not count may exceed the shift by any power.
    x = relative(t, k, _usable(shift)[:, None], LOGITS, j, N, False)
    rows = tl.sum(tl.where(by_row, FOLD(x), 0.0), 1)
    x = relative(t, k, _usable(other)[None, :], LOGITS, j, N, False)
    columns = tl.sum(tl.where(by_column, FOLD(x), 0.0), 0)
    SHIFTS = PARTIAL + partials(M, N, BM, BN)
    store_rows(PARTIAL, rows, pid_n, row, M, BM, False)
    store_rows(SHIFTS, shift, pid_n, row, M, BM, False)
    at = columns_of(pid_m, M, N, BN)
    store_columns(PARTIAL + at, columns, j, N, False)
    store_columns(SHIFTS + at, other, j, N, False)


@triton.jit(do_not_specialize=["M", "N", "offset"])
def maxima_kernel(
    X, Y, LOGITS, FLAG, POSITIVE, PARTIAL, M, N, D, stride_x, stride_y, offset, FOLD: tl.constexpr,
    SAME_ID: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Partial sums, and behind them, in the same layout, the shifts that they are relative to;
    positives where POSITIVE is given.

    With a FLAG there are fewer programs than tiles, since as a rule all they do is return.
    """
    if is_set(FLAG, True) == 0:
        return
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pid_m, pid_n = position(tile, tiles_m, tiles_n, GROUP)
        row, column = pid_m * BM, pid_n * BN
        i, j = row + tl.arange(0, BM), column + tl.arange(0, BN)
        t = product(
            X, Y, row, column, M, N, D, stride_x, stride_y, False, BM, BN, BK, EVEN, PRECISION, UNIT
        )
        t = normalised(t, LOGITS, i, j, M, N, False)
        if POSITIVE is not None:
            store_positives(POSITIVE, t, row, column, M, N, offset, BM, BN)
        k = affine(LOGITS)
        live = negatives(LOGITS, i, j, M, N, offset, False)
        by_row = of_rows(live, t, LOGITS, i, M, False)
        by_column = of_columns(live, t, LOGITS, j, N, False)
        _store_maxima(PARTIAL, by_row, by_column, t, k, LOGITS, pid_m, pid_n, M, N, FOLD, BM, BN)
        if SAME_ID != 0:
            same = positives(LOGITS, i, j, M, N, offset, False)
            _store_maxima(
                PARTIAL + 2 * partials(M, N, BM, BN), same, same, t, k, LOGITS, pid_m, pid_n, M, N,
                FOLD, BM, BN,
            )  # fmt: skip
