"""The second sweep: computes weights w_ij = activation(s_ij) * (a_i + b_j) of a tile's negatives,
and those of its positives by id, with c_i + d_j. Stores them for two library products, and sums
them for the gradients of scale and bias. Own positives are left out: their terms are the largest
ones, and `complete.py` adds them in fp32.

The stored weight is `w_ij * ENLARGED * factor_x_i * factor_y_j`. With these factors in it (SPREAD)
the products take the features as they are, and nothing normalised is stored; `complete.py` then
divides row i of `w @ y` by factor_x_i and row j of `w.T @ x` by factor_y_j. The range of fp16 is
too small for factors: there the products take normalised copies. fp16 needs ENLARGED instead:
weights are at most 2, and it would lose those below 6e-8 and blur those below 6e-5.

`weigh_kernel` takes the plain tiles and `weigh_edges_kernel` all others, both with one shift or
none; `weigh_apart_kernel` takes any tile, with a shift, or a level, for each line, and targets;
`weigh_kept_kernel` reads weights that the first sweep kept. Several are launched for a chunk, and
two flags of the device decide which one works: all shifts are equal; the kept weights are valid.

Kernels take the shifts and coefficients of rows and of columns for negatives and, with the suffix
_SAME, for positives by id, with _TAUGHT, for a teacher, whose weights of all pairs are added. Each
is None if the block has none. SAME_ID means the same as in the first sweep.

The kernels have more than fifteen run-time parameters, since they take the description of a block
of logits and the states of its lines.
"""

import triton
import triton.language as tl

from ..kinds import softmax_fold
from .bf16_parts import parts_of
from .flags import is_set
from .logits import (
    IDS_X,
    SCALE,
    THRESHOLD_X,
    affine,
    column_values,
    count_for_columns,
    count_for_rows,
    negatives,
    normalised,
    positives,
    relative,
    row_values,
    without_own_positives,
)
from .sweep import columns_of, store_columns, store_rows
from .targets import all_pairs, target_products
from .tile import (
    described_product,
    edge_position,
    in_slices,
    plain_position,
    position,
    product,
    rounded,
    store_positives,
    store_tile,
)


@triton.jit
def store_weights(
    W, w, LOGITS, row, column, M, N, stride_w, PLAIN: tl.constexpr, DESCRIBED: tl.constexpr,
    SPREAD: tl.constexpr, ENLARGED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Stores a tile of weights in the form that the products take. Split weights have three parts
    side by side: stride_w is then the distance from one part to the next."""
    w *= ENLARGED
    if SPREAD:
        i, j = row + tl.arange(0, BM), column + tl.arange(0, BN)
        w = normalised(w, LOGITS, i, j, M, N, PLAIN)
    if PRECISION == "split":
        high, middle, low = parts_of(w)
        stride = 3 * stride_w
        store_tile(W, high, row, column, 0, M, N, stride, PLAIN, DESCRIBED, BM, BN)
        store_tile(W, middle, row, column, stride_w, M, N, stride, PLAIN, DESCRIBED, BM, BN)
        store_tile(W, low, row, column, 2 * stride_w, M, N, stride, PLAIN, DESCRIBED, BM, BN)
    else:
        if PRECISION == "tf32":
            w = rounded(w, 13)
        store_tile(W, w, row, column, 0, M, N, stride_w, PLAIN, DESCRIBED, BM, BN)


@triton.jit
def _weigh_slice(t, column, arguments, BM: tl.constexpr, BN: tl.constexpr):
    """Stores weights, their sums over rows, and, if both sweeps are one, the columns' first-sweep
    sums. Returns the rows' first-sweep sums, and the sums of w and of w * t."""
    # Indexed by number: unpacking would turn the constants into tensors.
    row, M, N, offset, k, m = (
        arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5]
    )  # fmt: skip
    LOGITS, COEFFICIENTS, W, stride_w = arguments[6], arguments[7], arguments[8], arguments[9]
    POSITIVE, PARTIAL, columns, SUMS = (
        arguments[10], arguments[11], arguments[12], arguments[13]
    )  # fmt: skip
    PLAIN: tl.constexpr = arguments[14]
    DESCRIBED: tl.constexpr = arguments[15]
    SPREAD: tl.constexpr = arguments[16]
    ENLARGED: tl.constexpr = arguments[17]
    PRECISION: tl.constexpr = arguments[18]
    FOLD: tl.constexpr = arguments[19]
    ACTIVATION: tl.constexpr = arguments[20]
    SAME_ID: tl.constexpr = arguments[21]
    i, j = row + tl.arange(0, BM), column + tl.arange(0, BN)
    t = normalised(t, LOGITS, i, j, M, N, PLAIN)
    x = relative(t, k, m, LOGITS, j, N, PLAIN)
    w = ACTIVATION(x)
    if LOGITS[THRESHOLD_X] is not None:
        is_negative = negatives(LOGITS, i, j, M, N, offset, PLAIN)
        a, b = row_values(COEFFICIENTS[0], i, M, PLAIN), column_values(COEFFICIENTS[1], j, N, PLAIN)
        by_column = tl.where(count_for_columns(is_negative, t, LOGITS, j, N, PLAIN), w * b, 0.0)
        w = tl.where(count_for_rows(is_negative, t, LOGITS, i, M, PLAIN), w * a, 0.0) + by_column
    else:
        if COEFFICIENTS[0] is not None:
            w *= row_values(COEFFICIENTS[0], i, M, PLAIN) + column_values(
                COEFFICIENTS[1], j, N, PLAIN
            )
        if not PLAIN or LOGITS[IDS_X] is not None:
            is_negative = negatives(LOGITS, i, j, M, N, offset, PLAIN)
            w = tl.where(is_negative, w, 0.0)
    if SAME_ID != 0:
        same = positives(LOGITS, i, j, M, N, offset, PLAIN)
        a, b = row_values(COEFFICIENTS[2], i, M, PLAIN), column_values(COEFFICIENTS[3], j, N, PLAIN)
        w += tl.where(same, SAME_ID * ACTIVATION(x * SAME_ID) * (a + b), 0.0)
    # w * t is 0 for pairs of weight 0: their t is finite if the features are.
    # A sum by rows first, in a sliced layout, would make the compiler for sm_100 abort.
    sum_w, sum_wt = tl.sum(w), tl.sum(w * t)
    if SUMS is not None:
        store_columns(SUMS + (row // BM).to(tl.int64) * N, tl.sum(w, 0), j, N, PLAIN)
    if W is not None:
        store_weights(
            W, w, LOGITS, row, column, M, N, stride_w, PLAIN, DESCRIBED, SPREAD, ENLARGED,
            PRECISION, BM, BN,
        )  # fmt: skip
    # This comes after the weights: in the other order there are not enough registers.
    rows = 0.0
    if PARTIAL is not None:
        e = FOLD(x)
        if not PLAIN:
            store_positives(POSITIVE, t, row, column, M, N, offset, BM, BN)
            e = tl.where(is_negative, e, 0.0)
        store_columns(PARTIAL + columns, tl.sum(e, 0), j, N, PLAIN)
        rows = tl.sum(e, 1)
    return rows, sum_w, sum_wt


@triton.jit
def _store_totals(TOTALS, sum_w, sum_wt, pid_m, pid_n, M, N, BM: tl.constexpr, BN: tl.constexpr):
    tiles_n = tl.cdiv(N, BN)
    at = TOTALS + pid_m * tiles_n + pid_n
    tl.store(at, sum_w)
    tl.store(at + tl.cdiv(M, BM) * tiles_n, sum_wt)


@triton.jit
def _weigh_tile(
    pid_m, pid_n, X, Y, LOGITS, k, m, COEFFICIENTS, W, TOTALS, SUMS, POSITIVE, PARTIAL, M, N, D,
    stride_x, stride_y, stride_w, offset, PLAIN: tl.constexpr, SPREAD: tl.constexpr,
    ENLARGED: tl.constexpr, FOLD: tl.constexpr, ACTIVATION: tl.constexpr, SAME_ID: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, SLICES: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Computes a tile, stores its weights and its sums."""
    row, column = pid_m * BM, pid_n * BN
    if DESCRIBED:
        t = described_product(X, Y, row, column, D, BM, BN, BK, PRECISION, UNIT)
    else:
        t = product(
            X, Y, row, column, M, N, D, stride_x, stride_y, PLAIN, BM, BN, BK, EVEN, PRECISION,
            UNIT,
        )  # fmt: skip
    columns = columns_of(pid_m, M, N, BN)
    # The tuple is written in place: a variable would turn the constants in it into tensors.
    rows, sum_w, sum_wt = in_slices(
        _weigh_slice, t, column,
        (
            row, M, N, offset, k, m, LOGITS, COEFFICIENTS, W, stride_w, POSITIVE, PARTIAL, columns,
            SUMS, PLAIN, DESCRIBED, SPREAD, ENLARGED, PRECISION, FOLD, ACTIVATION, SAME_ID,
        ),
        BM, BN, SLICES,
    )  # fmt: skip
    if PARTIAL is not None:
        store_rows(PARTIAL, rows, pid_n, row, M, BM, PLAIN)
    _store_totals(TOTALS, sum_w, sum_wt, pid_m, pid_n, M, N, BM, BN)


# Coefficients of columns begin at M + column, so their alignment depends on the batch, and kernels
# must not be specialised on it. They stay out of tuples, whose members are always specialised.
UNALIGNED = ["A", "B", "A_SAME", "B_SAME"]
APART = [*UNALIGNED, "A_TAUGHT", "B_TAUGHT", "SHIFT_X", "SHIFT_Y", "SHIFT_X_SAME", "SHIFT_Y_SAME"]
APART += ["SHIFT_X_TAUGHT", "SHIFT_Y_TAUGHT"]


@triton.jit(
    do_not_specialize=["M", "N", "offset", "skipped"], do_not_specialize_on_alignment=UNALIGNED
)
def weigh_kernel(
    X, Y, LOGITS, SHIFT, ONE, A, B, A_SAME, B_SAME, W, TOTALS, SUMS, PARTIAL, M, N, stride_x,
    stride_y, stride_w, offset, skipped, D: tl.constexpr, SPREAD: tl.constexpr,
    ENLARGED: tl.constexpr, FOLD: tl.constexpr, ACTIVATION: tl.constexpr, SAME_ID: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, SLICES: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Weighs the plain tiles. ONE is the flag that all shifts are equal, so that one exponential
    serves. PARTIAL is given if both sweeps are done in one go, SUMS if the columns' sums of weights
    are wanted. A and B are absent if they add up to 1. DESCRIBED: X, Y and W are tensor
    descriptors, and programs loop over tiles, as in the first sweep."""
    if is_set(ONE, True) == 0:
        return
    m = 0.0
    if SHIFT is not None:
        m = tl.load(SHIFT).to(tl.float32)
    k = affine(LOGITS)
    if DESCRIBED:
        tiles = (M // BM) * (N // BN - skipped)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            pid_m, pid_n = plain_position(tile, M, N, offset, skipped, BM, BN, GROUP)
            _weigh_tile(
                pid_m, pid_n, X, Y, LOGITS, k, m, (A, B, A_SAME, B_SAME), W, TOTALS, SUMS, None,
                PARTIAL, M, N, D, stride_x, stride_y, stride_w, offset, True, SPREAD, ENLARGED,
                FOLD, ACTIVATION, SAME_ID, BM, BN, BK, EVEN, PRECISION, UNIT, SLICES, True,
            )  # fmt: skip
    else:
        pid_m, pid_n = plain_position(tl.program_id(0), M, N, offset, skipped, BM, BN, GROUP)
        _weigh_tile(
            pid_m, pid_n, X, Y, LOGITS, k, m, (A, B, A_SAME, B_SAME), W, TOTALS, SUMS, None,
            PARTIAL, M, N, D, stride_x, stride_y, stride_w, offset, True, SPREAD, ENLARGED, FOLD,
            ACTIVATION, SAME_ID, BM, BN, BK, EVEN, PRECISION, UNIT, SLICES, False,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["M", "N", "offset", "skipped"], do_not_specialize_on_alignment=UNALIGNED
)
def weigh_edges_kernel(
    X, Y, LOGITS, SHIFT, ONE, A, B, A_SAME, B_SAME, W, TOTALS, SUMS, POSITIVE, PARTIAL, M, N,
    D, stride_x, stride_y, stride_w, offset, skipped, SPREAD: tl.constexpr, ENLARGED: tl.constexpr,
    FOLD: tl.constexpr, ACTIVATION: tl.constexpr, SAME_ID: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Weighs the tiles of the edges, one program each."""
    if is_set(ONE, True) == 0:
        return
    m = 0.0
    if SHIFT is not None:
        m = tl.load(SHIFT).to(tl.float32)
    k = affine(LOGITS)
    pid_m, pid_n = edge_position(tl.program_id(0), M, N, offset, skipped, BM, BN)
    _weigh_tile(
        pid_m, pid_n, X, Y, LOGITS, k, m, (A, B, A_SAME, B_SAME), W, TOTALS, SUMS, POSITIVE,
        PARTIAL, M, N, D, stride_x, stride_y, stride_w, offset, False, SPREAD, ENLARGED, FOLD,
        ACTIVATION, SAME_ID, BM, BN, BK, EVEN, PRECISION, UNIT, SLICES, False,
    )  # fmt: skip


@triton.jit
def _apart(
    t, k, LOGITS, SHIFT_X, SHIFT_Y, A, B, i, j, M, N, ACTIVATION: tl.constexpr,
    NEGATED: tl.constexpr,
):  # fmt: skip
    """Returns the terms of rows and of columns in the weights, each with its line's shift or
    level."""
    x = relative(t, k, row_values(SHIFT_X, i, M, False), LOGITS, j, N, False)
    if NEGATED:
        x = -x
    by_row = ACTIVATION(x) * row_values(A, i, M, False)
    x = relative(t, k, column_values(SHIFT_Y, j, N, False), LOGITS, j, N, False)
    if NEGATED:
        x = -x
    return by_row, ACTIVATION(x) * column_values(B, j, N, False)


@triton.jit(
    do_not_specialize=["M", "N", "offset"],
    do_not_specialize_on_alignment=APART,
)
def weigh_apart_kernel(
    X, Y, LOGITS, SHIFT_X, SHIFT_Y, SHIFT_X_SAME, SHIFT_Y_SAME, SHIFT_X_TAUGHT, SHIFT_Y_TAUGHT,
    UNLESS, A, B, A_SAME, B_SAME, A_TAUGHT, B_TAUGHT, TARGETS, TARGET_LOGITS, W, TOTALS, SUMS, M, N,
    D, stride_x, stride_y, stride_w, offset, SPREAD: tl.constexpr, ENLARGED: tl.constexpr,
    ACTIVATION: tl.constexpr, SAME_ID: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, TARGET_EVEN: tl.constexpr, TARGET_UNIT: tl.constexpr,
):  # fmt: skip
    """Weighs any tile with a number for each line, which takes two activations a pair. Returns at
    once if UNLESS is set."""
    if is_set(UNLESS, False) != 0:
        return
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    k = affine(LOGITS)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pid_m, pid_n = position(tile, tiles_m, tiles_n, GROUP)
        row, column = pid_m * BM, pid_n * BN
        i, j = row + tl.arange(0, BM), column + tl.arange(0, BN)
        t = product(
            X, Y, row, column, M, N, D, stride_x, stride_y, False, BM, BN, BK, EVEN, PRECISION, UNIT
        )
        t = normalised(t, LOGITS, i, j, M, N, False)
        compared = t
        if TARGETS is not None:
            target = target_products(
                TARGETS, TARGET_LOGITS, row, column, M, N, BM, BN, BK, TARGET_EVEN, PRECISION,
                TARGET_UNIT,
            )  # fmt: skip
            if TARGET_LOGITS[SCALE] is None:
                compared = target
        by_row, by_column = _apart(
            t, k, LOGITS, SHIFT_X, SHIFT_Y, A, B, i, j, M, N, ACTIVATION, False
        )
        is_negative = negatives(LOGITS, i, j, M, N, offset, False)
        if LOGITS[THRESHOLD_X] is None:
            w = tl.where(is_negative, by_row + by_column, 0.0)
        else:
            # The two terms have masks of their own: the logit of a pair that does not count for a
            # line may exceed that line's shift by any amount.
            of_rows = count_for_rows(is_negative, compared, LOGITS, i, M, False)
            of_columns = count_for_columns(is_negative, compared, LOGITS, j, N, False)
            w = tl.where(of_rows, by_row, 0.0) + tl.where(of_columns, by_column, 0.0)
        if SAME_ID != 0:
            by_row, by_column = _apart(
                t, k, LOGITS, SHIFT_X_SAME, SHIFT_Y_SAME, A_SAME, B_SAME, i, j, M, N, ACTIVATION,
                SAME_ID == -1,
            )  # fmt: skip
            same = positives(LOGITS, i, j, M, N, offset, False)
            if SAME_ID == -1:
                w -= tl.where(same, by_row + by_column, 0.0)
            else:
                w += tl.where(same, by_row + by_column, 0.0)
        here = without_own_positives(i, j, M, N, offset, False)
        if A_TAUGHT is not None:
            by_row, by_column = _apart(
                target, affine(TARGET_LOGITS), TARGET_LOGITS, SHIFT_X_TAUGHT, SHIFT_Y_TAUGHT,
                A_TAUGHT, B_TAUGHT, i, j, M, N, softmax_fold, False,
            )  # fmt: skip
            here = all_pairs(i, j, M, N)
            w += tl.where(here, by_row + by_column, 0.0)
        sum_w, sum_wt = tl.sum(w), tl.sum(w * tl.where(here, t, 0.0))
        _store_totals(TOTALS, sum_w, sum_wt, pid_m, pid_n, M, N, BM, BN)
        if SUMS is not None:
            store_columns(SUMS + pid_m.to(tl.int64) * N, tl.sum(w, 0), j, N, False)
        if W is not None:
            store_weights(
                W, w, LOGITS, row, column, M, N, stride_w, False, False, SPREAD, ENLARGED,
                PRECISION, BM, BN,
            )  # fmt: skip
