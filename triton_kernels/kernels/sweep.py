"""The first sweep: folds each tile of logits into one number for each of its rows and columns.

`sweep_kernel`, and `sweep_edges_kernel` for the tiles of the edges, use one shift for all pairs, or
none, so that one exponential serves row and column. In `sweep_apart_kernel` every row and column
has a number of its own.

In a kind with levels this is the line's level, and `sweep_apart_kernel` is launched alone. In a
kind with a shift it is the line's shift, from its largest logit in the tile: a large block always
launches `sweep_apart_kernel` after the others. It returns at once unless the device's flag says
that one shift was too coarse, so the host never waits to learn which kernel did the work. A small
block, whose time goes into launches, launches `sweep_apart_kernel` alone. Other kinds never need
that kernel.

Both write partials, one number for each line of each tile: rows first, (tiles_n, M), then columns,
(tiles_m, N). `finalise.py` adds them up in a fixed order. Positives by id have layers of partials
of their own, computed like those of the negatives. SAME_ID is 0 if there are none, else the sign
that their logits are folded with.

For a block with targets, `sweep_apart_kernel` is launched alone and computes the targets' products,
too; in a kind without shifts or levels its lines have the number 0. A teacher weighs all pairs by a
softmax of its own and adds three layers of partials at the end.

The kernels have more than fifteen run-time parameters, since every launch takes the description of
a whole block of logits.
"""

import triton
import triton.language as tl

from ..kinds import softmax_fold
from .flags import is_set
from .logits import (
    IDS_X,
    SCALE,
    THRESHOLD_X,
    affine,
    count_for_columns,
    count_for_rows,
    load_lines,
    negatives,
    normalised,
    positives,
    relative,
)
from .targets import all_pairs, target_products
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
    """Stores the partials of a tile's rows."""
    at = PARTIAL + pid_n.to(tl.int64) * M + row + tl.arange(0, BM)
    if PLAIN:
        tl.store(at, rows)
    else:
        tl.store(at, rows, mask=row + tl.arange(0, BM) < M)


@triton.jit
def columns_of(pid_m, M, N, BN: tl.constexpr):
    """Returns where the column partials of a row of tiles begin: behind all row partials."""
    return tl.cdiv(N, BN).to(tl.int64) * M + pid_m.to(tl.int64) * N


@triton.jit
def store_columns(COLUMNS, columns, j, N, PLAIN: tl.constexpr):
    """Stores one number for each of the columns j."""
    if PLAIN:
        tl.store(COLUMNS + j, columns)
    else:
        tl.store(COLUMNS + j, columns, mask=j < N)


@triton.jit
def partials(M, N, BM: tl.constexpr, BN: tl.constexpr):
    """Returns how many numbers one layer of partials has."""
    return tl.cdiv(N, BN).to(tl.int64) * M + tl.cdiv(M, BM).to(tl.int64) * N


@triton.jit
def _sweep_slice(t, column, arguments, BM: tl.constexpr, BN: tl.constexpr):
    """Stores the columns' sums and the weights that are kept. Returns three sums for each row: over
    negatives; over positives by id, or of the kept w; of the kept w * t."""
    # Indexed by number: unpacking would turn the constants into tensors.
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
        is_negative = negatives(LOGITS, i, j, M, N, offset, PLAIN)
        by_column = tl.where(count_for_columns(is_negative, t, LOGITS, j, N, PLAIN), by_row, 0.0)
        by_row = tl.where(count_for_rows(is_negative, t, LOGITS, i, M, PLAIN), by_row, 0.0)
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
            w, t = tl.where(is_negative, w, 0.0), tl.where(is_negative, t, 0.0)
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
    """Computes a tile, folds it and stores its partials."""
    row, column = pid_m * BM, pid_n * BN
    if DESCRIBED:
        t = described_product(X, Y, row, column, D, BM, BN, BK, PRECISION, UNIT)
    else:
        t = product(
            X, Y, row, column, M, N, D, stride_x, stride_y, PLAIN, BM, BN, BK, EVEN, PRECISION,
            UNIT,
        )  # fmt: skip
    columns, layer = columns_of(pid_m, M, N, BN), partials(M, N, BM, BN)
    # The tuple is written in place: a variable would turn the constants in it into tensors.
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
    """Sweeps the plain tiles. DESCRIBED: X, Y and KEPT are tensor descriptors, and the launch has
    as many programs as fit on the card. Each loops over tiles and prefetches the next features."""
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
    """Sweeps the tiles of the edges, one program each."""
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
    """Returns each line's largest logit, rounded up to an integer; -inf if it has no pairs."""
    return tl.ceil(tl.max(x, DIM))


@triton.jit
def _usable(shift):
    """Returns a finite shift for every line: 0 for those without pairs."""
    return tl.where(shift == float("-inf"), 0.0, shift)


@triton.jit
def _store_apart(
    PARTIAL, by_row, by_column, t, k, LOGITS, LEVEL_X, LEVEL_Y, WEIGHED, pid_m, pid_n, M, N,
    FOLD: tl.constexpr, ACTIVATION: tl.constexpr, SHIFTED: tl.constexpr, NEGATED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Stores two layers of partials of a tile, one for each number of a state: shifts, 0 unless
    SHIFTED, and sums over the pairs that count; or numbers of pairs above the lines' levels, and
    sums over these. With WEIGHED it stores a third, the sums of terms times WEIGHED."""
    row = pid_m * BM
    i, j = row + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN)
    if LEVEL_X is None and not SHIFTED:
        first_x, first_y = tl.zeros((BM,), tl.float32), tl.zeros((BN,), tl.float32)
        own = first_x
    elif LEVEL_X is None:
        x = relative(t, k, 0.0, LOGITS, j, N, False)
        first_x = _shift_of_lines(tl.where(by_row, x, float("-inf")), 1)
        first_y = _shift_of_lines(tl.where(by_column, x, float("-inf")), 0)
        own = _usable(first_x)
    else:
        own = load_lines(LEVEL_X, i, M, False).to(tl.float32)
    # The masks apply after the exponential: the logit of a pair that does not count may exceed the
    # shift by any amount, and its exponential may be infinite.
    x = relative(t, k, own[:, None], LOGITS, j, N, False)
    if NEGATED:
        x = -x
    term = tl.where(by_row, FOLD(x), 0.0)
    rows = tl.sum(term, 1)
    if WEIGHED is not None:
        rows_weighed = tl.sum(term * WEIGHED, 1)
    if LEVEL_X is None:
        own = _usable(first_y)
    else:
        first_x = tl.sum(tl.where(by_row, ACTIVATION(x), 0.0), 1)
        own = load_lines(LEVEL_Y, j, N, False).to(tl.float32)
    x = relative(t, k, own[None, :], LOGITS, j, N, False)
    if NEGATED:
        x = -x
    term = tl.where(by_column, FOLD(x), 0.0)
    columns = tl.sum(term, 0)
    if LEVEL_X is not None:
        first_y = tl.sum(tl.where(by_column, ACTIVATION(x), 0.0), 0)
    SUMS = PARTIAL + partials(M, N, BM, BN)
    store_rows(SUMS, rows, pid_n, row, M, BM, False)
    store_rows(PARTIAL, first_x, pid_n, row, M, BM, False)
    at = columns_of(pid_m, M, N, BN)
    store_columns(SUMS + at, columns, j, N, False)
    store_columns(PARTIAL + at, first_y, j, N, False)
    if WEIGHED is not None:
        THIRD = SUMS + partials(M, N, BM, BN)
        store_rows(THIRD, rows_weighed, pid_n, row, M, BM, False)
        store_columns(THIRD + at, tl.sum(term * WEIGHED, 0), j, N, False)


@triton.jit(
    do_not_specialize=["M", "N", "offset"],
    do_not_specialize_on_alignment=["LEVEL_X", "LEVEL_Y"],
)
def sweep_apart_kernel(
    X, Y, LOGITS, FLAG, LEVEL_X, LEVEL_Y, TARGETS, TARGET_LOGITS, POSITIVE, PARTIAL, M, N, D,
    stride_x, stride_y, offset, FOLD: tl.constexpr, ACTIVATION: tl.constexpr, SAME_ID: tl.constexpr,
    SHIFTED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
    TARGET_EVEN: tl.constexpr, TARGET_UNIT: tl.constexpr,
):  # fmt: skip
    """Stores the partials of states whose lines have numbers of their own: levels, if given, else
    shifts. Also stores the positives if POSITIVE is given, and the partials of a teacher.

    With a FLAG there are fewer programs than tiles: as a rule they return at once.
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
        compared = t
        if TARGETS is not None:
            target = target_products(
                TARGETS, TARGET_LOGITS, row, column, M, N, BM, BN, BK, TARGET_EVEN, PRECISION,
                TARGET_UNIT,
            )  # fmt: skip
            if TARGET_LOGITS[SCALE] is None:
                compared = target
        is_negative = negatives(LOGITS, i, j, M, N, offset, False)
        by_row = count_for_rows(is_negative, compared, LOGITS, i, M, False)
        by_column = count_for_columns(is_negative, compared, LOGITS, j, N, False)
        _store_apart(
            PARTIAL, by_row, by_column, t, k, LOGITS, LEVEL_X, LEVEL_Y, None, pid_m, pid_n, M, N,
            FOLD, ACTIVATION, SHIFTED, False, BM, BN,
        )  # fmt: skip
        if SAME_ID != 0:
            same = positives(LOGITS, i, j, M, N, offset, False)
            _store_apart(
                PARTIAL + 2 * partials(M, N, BM, BN), same, same, t, k, LOGITS, None, None, None,
                pid_m, pid_n, M, N, FOLD, ACTIVATION, SHIFTED, SAME_ID == -1, BM, BN,
            )  # fmt: skip
        if TARGETS is not None and TARGET_LOGITS[SCALE] is not None:
            FIRST: tl.constexpr = 2 if SAME_ID == 0 else 4
            every = all_pairs(i, j, M, N)
            _store_apart(
                PARTIAL + FIRST * partials(M, N, BM, BN), every, every, target,
                affine(TARGET_LOGITS), TARGET_LOGITS, None, None, t, pid_m, pid_n, M, N,
                softmax_fold, softmax_fold, True, False, BM, BN,
            )  # fmt: skip
