"""A tile of t_ij = <x_i, y_j>: its place, its product, its slices and its stores.

A chunk has two types of tiles, and each type has its own launch:

    plain    whole tiles without own positives: they need no masks, so every store is 16 bytes wide
    edges    all others: those on the right and lower edge, and `skipped` whole tiles around the
             diagonal in each row of tiles

One kernel with a branch for both would keep both results in registers, and spill. Rows and columns
past an edge are computed from row or column 0 instead of being masked, so that loads stay wide; the
masks of `logits.py` take them out of every sum afterwards. The product's only mask is that of the
last step along D; it has none if the step divides D.
"""

import triton
import triton.language as tl

from ..constants import INTERPRETED
from .split_product import add_product


@triton.jit
def rounded(x, BITS: tl.constexpr):
    """Returns x without the last BITS of its mantissa, 13 for tf32 and 16 for bf16, rounded to
    nearest even. Tensor cores would truncate."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + ((1 << (BITS - 1)) - 1) + ((bits >> BITS) & 1)) & -(1 << BITS)
    # Infinities and NaN stay as they are.
    return tl.where(tl.abs(x) < float("inf"), bits.to(tl.float32, bitcast=True), x)


@triton.jit
def stored_as(x, dtype: tl.constexpr):
    """Returns x rounded to a dtype."""
    # A card rounds; the interpreter's conversion to bf16 truncates.
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        x = rounded(x, 16)
    return x.to(dtype)


@triton.jit
def position(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Returns row and column of a tile. Tiles are numbered in groups of GROUP rows of tiles, column
    after column, so that programs that run together share features in L2."""
    group = tile // (GROUP * tiles_n)
    within = tile - group * (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    column = within // height
    return group * GROUP + within - column * height, column


@triton.jit
def _first_skipped(row_of_tiles, full_n, skipped, offset, BM: tl.constexpr, BN: tl.constexpr):
    """Returns the first of the `skipped` whole tiles around the diagonal. If the diagonal has left
    the chunk these are tiles at its end: any tile may be taken as one of the edges."""
    return tl.minimum(tl.maximum(row_of_tiles * BM + offset, 0) // BN, full_n - skipped)


@triton.jit
def plain_position(
    tile, M, N, offset, skipped, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr
):
    """Returns row and column of a plain tile."""
    full_n = N // BN
    pid_m, column = position(tile, M // BM, full_n - skipped, GROUP)
    first = _first_skipped(pid_m, full_n, skipped, offset, BM, BN)
    return pid_m, tl.where(column >= first, column + skipped, column)


@triton.jit
def edge_position(tile, M, N, offset, skipped, BM: tl.constexpr, BN: tl.constexpr):
    """Returns row and column of a tile of the edges. The skipped tiles of each row of tiles come
    first, then the right edge, then the lower one."""
    full_m, full_n = M // BM, N // BN
    pid_m, pid_n = full_m, tile - full_m * skipped
    if tile < full_m * skipped:
        pid_m = tile // skipped
        first = _first_skipped(pid_m, full_n, skipped, offset, BM, BN)
        pid_n = first + tile - pid_m * skipped
    elif full_n < tl.cdiv(N, BN):
        on_the_right = pid_n < tl.cdiv(M, BM)
        pid_m = tl.where(on_the_right, pid_n, full_m)
        pid_n = tl.where(on_the_right, full_n, pid_n - tl.cdiv(M, BM))
    return pid_m, pid_n


@triton.jit
def product(
    X, Y, row, column, M, N, D, stride_x, stride_y, PLAIN: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Returns <x_i, y_j> in fp32 for the BM rows from `row` and the BN columns from `column` on.

    D and the strides count UNIT elements: the compiler then knows that rows begin on 16 bytes.
    With PRECISION "split" the operands have three parts, D apart (`bf16_parts.py`), and D is a
    multiple of BK.
    """
    i, j = row + tl.arange(0, BM), column + tl.arange(0, BN)
    if not PLAIN:
        i, j = tl.where(i < M, i, 0), tl.where(j < N, j, 0)
    k = tl.arange(0, BK)
    # A batch may hold more than 2^31 numbers.
    x = X + i.to(tl.int64)[:, None] * stride_x * UNIT + k[None, :]
    y = Y + j.to(tl.int64)[None, :] * stride_y * UNIT + k[:, None]
    t = tl.zeros((BM, BN), tl.float32)
    for start in range(0, D * UNIT, BK):
        if PRECISION == "split":
            t = add_product(
                t, tl.load(x), tl.load(x + D * UNIT), tl.load(x + 2 * D * UNIT), tl.load(y),
                tl.load(y + D * UNIT), tl.load(y + 2 * D * UNIT),
            )  # fmt: skip
        else:
            if EVEN:
                a, b = tl.load(x), tl.load(y)
            else:
                a = tl.load(x, mask=(start + k < D * UNIT)[None, :], other=0.0)
                b = tl.load(y, mask=(start + k < D * UNIT)[:, None], other=0.0)
            # The interpreter would multiply the bit patterns of bf16.
            if INTERPRETED:
                a, b = a.to(tl.float32), b.to(tl.float32)
            t = tl.dot(a, b, t, input_precision=PRECISION)
        x += BK
        y += BK
    return t


@triton.jit
def described_product(
    X, Y, row, column, D, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Returns the same product from tensor descriptors: they need no registers for addresses, and
    read zeros past D.

    D should be a constant. For an inner loop of unknown length the compiler emits a second copy of
    the epilogue, for a product without steps.
    """
    t = tl.zeros((BM, BN), tl.float32)
    for start in range(0, D * UNIT, BK):
        a, b = X.load([row, start]), Y.load([column, start])
        if PRECISION == "split":
            middle, low = D * UNIT + start, 2 * D * UNIT + start
            t = add_product(
                t, a, X.load([row, middle]), X.load([row, low]), b.T, Y.load([column, middle]).T,
                Y.load([column, low]).T,
            )  # fmt: skip
        else:
            if INTERPRETED:
                a, b = a.to(tl.float32), b.to(tl.float32)
            t = tl.dot(a, b.T, t, input_precision=PRECISION)
    return t


@triton.jit
def store_positives(POSITIVE, t, row, column, M, N, offset, BM: tl.constexpr, BN: tl.constexpr):
    """Stores the positives' t if the diagonal passes through the tile. Scalars decide that: it
    takes no reduction."""
    ahead = row + offset - column
    if (ahead < BN) & (ahead > -BM):
        i, j = row + tl.arange(0, BM), column + tl.arange(0, BN)
        j_of_row = i + offset
        here = (j_of_row >= column) & (j_of_row < tl.minimum(column + BN, N)) & (i < M)
        positive = tl.sum(tl.where(j_of_row[:, None] == j[None, :], t, 0.0), 1)
        tl.store(POSITIVE + i, positive.to(tl.float64), mask=here)


@triton.jit
def store_tile(
    OUT, value, row, column, moved, M, N, stride, PLAIN: tl.constexpr, DESCRIBED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Stores a tile, `moved` columns to the right of its own place. Rows of OUT are a multiple of
    16 numbers apart, and may be written past N up to a multiple of 8. The compiler then knows that
    eight neighbours are stored or none, and stores 16 bytes at once. With a mask of `j < N` it
    would store number by number."""
    if DESCRIBED:
        OUT.store([row, column + moved], stored_as(value, OUT.dtype))
    else:
        i, j = row + tl.arange(0, BM), column + tl.arange(0, BN)
        at = i.to(tl.int64)[:, None] * stride + (moved + j)[None, :]
        if PLAIN:
            tl.store(OUT + at, stored_as(value, OUT.dtype.element_ty))
        else:
            mask = (i < M)[:, None] & (j // 8 < tl.cdiv(N, 8))[None, :]
            tl.store(OUT + at, stored_as(value, OUT.dtype.element_ty), mask=mask)


@triton.jit
def _halves(t, BM: tl.constexpr, BN: tl.constexpr):
    """Returns the left and the right half of t."""
    return t.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()


@triton.jit
def in_slices(
    FUNCTION: tl.constexpr, t, column, arguments, BM: tl.constexpr, BN: tl.constexpr,
    SLICES: tl.constexpr,
):  # fmt: skip
    """Calls FUNCTION(slice of t, its first column, arguments) for one slice of columns after the
    other, which takes fewer registers than the whole tile. FUNCTION returns three values; returns
    the sum of each over the slices."""
    tl.static_assert(SLICES == 1 or SLICES == 2 or SLICES == 4)
    WIDTH: tl.constexpr = BN // SLICES
    if SLICES == 1:
        a, b, c = FUNCTION(t, column, arguments, BM, BN)
    else:
        left, right = _halves(t, BM, BN)
        if SLICES == 2:
            a, b, c = FUNCTION(left, column, arguments, BM, WIDTH)
            d, e, f = FUNCTION(right, column + WIDTH, arguments, BM, WIDTH)
        else:
            first, second = _halves(left, BM, BN // 2)
            third, fourth = _halves(right, BM, BN // 2)
            a, b, c = FUNCTION(first, column, arguments, BM, WIDTH)
            d, e, f = FUNCTION(second, column + WIDTH, arguments, BM, WIDTH)
            a, b, c = a + d, b + e, c + f
            d, e, f = FUNCTION(third, column + 2 * WIDTH, arguments, BM, WIDTH)
            a, b, c = a + d, b + e, c + f
            d, e, f = FUNCTION(fourth, column + 3 * WIDTH, arguments, BM, WIDTH)
        a, b, c = a + d, b + e, c + f
    return a, b, c
