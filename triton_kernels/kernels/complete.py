"""Turns products of weights and features into gradients: adds the positive's term, divides by
the row's factor, applies the normalisation's Jacobian, gain and scale; completes the totals.

    g_i = product_i / (ENLARGED * factor_i) + p_i * partner^_i
    dx_i = gain * scale * factor_i * (g_i - x^_i <x^_i, g_i>)

x^ is x times its factor. partner^ is the features of the row's own positive times their factor, and
p_i is that positive's weight. The division by factor_i takes the factor out of the stored weights;
without SPREAD (fp16) they do not contain it, and it is left out. Without the projection, dx_i =
gain * scale * g_i. The work is O((M + N) D), ROWS rows at a time.

The kernel has more than fifteen run-time parameters, since it takes the rows and the gradients of
both towers.
"""

import triton
import triton.language as tl

from ...engine import tiny_norms
from .finalise import sum_of_totals, tiles_written
from .tile import stored_as

CLAMPED = tl.constexpr(tiny_norms.CLAMPED)


@triton.jit
def _gradient(
    PRODUCT, PARTNER, i, j, start, D, stride_product, stride_partner, divisor, partner_weight, row,
    has_partner, BK: tl.constexpr,
):  # fmt: skip
    """Returns g of ROWS rows for BK features from `start` on."""
    k = start + tl.arange(0, BK)
    mask = row[:, None] & (k < D)[None, :]
    at = i.to(tl.int64)[:, None] * stride_product + k[None, :]
    g = tl.load(PRODUCT + at, mask=mask, other=0.0) * divisor[:, None]
    at = j.to(tl.int64)[:, None] * stride_partner + k[None, :]
    partner = tl.load(PARTNER + at, mask=mask & has_partner[:, None], other=0.0).to(tl.float32)
    return g + tl.where(has_partner[:, None], partner_weight[:, None] * partner, 0.0)


@triton.jit
def _complete(
    program, PRODUCT, X, PARTNER, FX, FP, WEIGHT, gain, OUT, M, N, D, first, offset, stride_product,
    stride_x, stride_partner, stride_out, BY_PARTNER: tl.constexpr, SPREAD: tl.constexpr,
    PROJECT: tl.constexpr, CLAMPED_IS_ZERO: tl.constexpr, ENLARGED: tl.constexpr,
    ROWS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Completes rows first .. first + M of one tower. The partner of row i, its positive, is row
    i + offset of the other tower's N rows. WEIGHT is indexed by rows, or by partners (BY_PARTNER).
    PRODUCT may be OUT: each program reads an element before it overwrites it."""
    i = program * ROWS + tl.arange(0, ROWS)
    row = i < M
    j = first + i + offset
    has_partner = row & (j >= 0) & (j < N)
    at = first + i
    if BY_PARTNER:
        at = j
    p = tl.load(WEIGHT + at, mask=has_partner, other=0.0).to(tl.float32)
    if FP is not None:
        p *= tl.load(FP + j, mask=has_partner, other=0.0)
    factor = tl.full((ROWS,), 1.0, tl.float32)
    if FX is not None:
        factor = tl.load(FX + first + i, mask=row, other=1.0)
    divisor = tl.full((ROWS,), 1.0 / ENLARGED, tl.float32)
    if SPREAD:
        divisor = divisor / factor
    multiplier = tl.zeros((ROWS,), tl.float32) + gain
    # A norm below 1e-12 was clamped: these features were divided by a constant.
    clamped = factor >= CLAMPED
    along = tl.zeros((ROWS,), tl.float32)
    x = X + (first + i).to(tl.int64)[:, None] * stride_x + tl.arange(0, BK)[None, :]
    if PROJECT:
        multiplier = gain * factor
        for start in range(0, D, BK):
            g = _gradient(
                PRODUCT, PARTNER, i, j, start, D, stride_product, stride_partner, divisor, p, row,
                has_partner, BK,
            )  # fmt: skip
            mask = row[:, None] & (start + tl.arange(0, BK) < D)[None, :]
            unit = tl.load(x + start, mask=mask, other=0.0).to(tl.float32) * factor[:, None]
            along += tl.sum(unit * g, 1)
        along = tl.where(clamped, 0.0, along)
    for start in range(0, D, BK):
        g = _gradient(
            PRODUCT, PARTNER, i, j, start, D, stride_product, stride_partner, divisor, p, row,
            has_partner, BK,
        )  # fmt: skip
        mask = row[:, None] & (start + tl.arange(0, BK) < D)[None, :]
        if PROJECT:
            unit = tl.load(x + start, mask=mask, other=0.0).to(tl.float32) * factor[:, None]
            g -= unit * along[:, None]
        g *= multiplier[:, None]
        if CLAMPED_IS_ZERO:
            # 1e12 times anything overflows fp16: a zero row gets the gradient 0, not infinity.
            g = tl.where(clamped[:, None], 0.0, g)
        out = OUT + i.to(tl.int64)[:, None] * stride_out + (start + tl.arange(0, BK))[None, :]
        tl.store(out, stored_as(g, OUT.dtype.element_ty), mask=mask)


@triton.jit
def _complete_totals(
    PARTIAL, FLAG, TOTALS, VALID, MOMENTS, COEFFICIENTS, WEIGHT, POSITIVE, GAIN, OUT, M, N, offset,
    tiles, tiles_otherwise, kept_rows, LANES: tl.constexpr,
):  # fmt: skip
    """Stores gain times the sums of w and of w * t, positives included. PARTIAL holds the last
    chunk's sums, TOTALS those of earlier chunks, MOMENTS those of the kept rows, which count only
    if VALID is set."""
    lane = tl.arange(0, LANES)
    w, wt = tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.float64)
    for start in range(0, M, LANES):
        i = start + lane
        here = (i < M) & (i + offset >= 0) & (i + offset < N)
        p = tl.load(WEIGHT + i, mask=here, other=0.0).to(tl.float64)
        w += p
        wt += p * tl.load(POSITIVE + i, mask=here, other=0.0)
    sum_w, sum_wt = tl.sum(w, 0), tl.sum(wt, 0)
    if TOTALS is not None:
        sum_w += tl.load(TOTALS)
        sum_wt += tl.load(TOTALS + 1)
    tiles = tiles_written(FLAG, tiles, tiles_otherwise)
    sum_w += sum_of_totals(PARTIAL, tiles, LANES)
    sum_wt += sum_of_totals(PARTIAL + tiles, tiles, LANES)
    if MOMENTS is not None:
        valid = tl.load(VALID) != 0
        w, wt = tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.float64)
        for start in range(0, M + N, LANES):
            line = start + lane
            mask = valid & (line < M + N) & ((line < kept_rows) | (line >= M))
            a = tl.load(COEFFICIENTS + line, mask=mask, other=0.0)
            w += a * tl.load(MOMENTS + line, mask=mask, other=0.0)
            wt += a * tl.load(MOMENTS + M + N + line, mask=mask, other=0.0)
        sum_w += tl.sum(w, 0)
        sum_wt += tl.sum(wt, 0)
    gain = tl.load(GAIN).to(tl.float64)
    tl.store(OUT, gain * sum_w)
    tl.store(OUT + 1, gain * sum_wt)


COUNTS = ["tiles", "tiles_otherwise", "kept_rows"]


@triton.jit(do_not_specialize=["M", "N", "rows", "first", "offset", *COUNTS])
def complete_kernel(
    PRODUCT_X, PRODUCT_Y, X, Y, FX, FY, WEIGHT, GAIN, SCALE, OUT_X, OUT_Y, PARTIAL, FLAG, TOTALS,
    VALID, MOMENTS, COEFFICIENTS, POSITIVE, OUT_TOTALS, M, N, D, rows, first, offset, tiles,
    tiles_otherwise, kept_rows, stride_product_x, stride_product_y, stride_x, stride_y,
    stride_out_x, stride_out_y, SPREAD: tl.constexpr, PROJECT_X: tl.constexpr,
    PROJECT_Y: tl.constexpr, CLAMPED_IS_ZERO_X: tl.constexpr, CLAMPED_IS_ZERO_Y: tl.constexpr,
    ENLARGED: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Completes the totals, `rows` rows of x from `first` on, and all of y, each only if it has an
    OUT. One launch does it all: launches dominate the time of a small batch."""
    programs_x = 0
    if OUT_X is not None:
        programs_x = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    # The totals come first: a single program goes through all lines for them.
    if OUT_TOTALS is not None:
        program -= 1
    gain = (tl.load(GAIN).to(tl.float64) * tl.load(SCALE).to(tl.float64)).to(tl.float32)
    if program < 0:
        if OUT_TOTALS is not None:
            _complete_totals(
                PARTIAL, FLAG, TOTALS, VALID, MOMENTS, COEFFICIENTS, WEIGHT, POSITIVE, GAIN,
                OUT_TOTALS, M, N, offset, tiles, tiles_otherwise, kept_rows, LANES,
            )  # fmt: skip
    elif program < programs_x:
        if OUT_X is not None:
            _complete(
                program, PRODUCT_X, X, Y, FX, FY, WEIGHT, gain, OUT_X, rows, N, D, first, offset,
                stride_product_x, stride_x, stride_y, stride_out_x, False, SPREAD, PROJECT_X,
                CLAMPED_IS_ZERO_X, ENLARGED, ROWS, BK,
            )  # fmt: skip
    else:
        if OUT_Y is not None:
            _complete(
                program - programs_x, PRODUCT_Y, Y, X, FY, FX, WEIGHT, gain, OUT_Y, N, M, D, 0,
                -offset, stride_product_y, stride_y, stride_x, stride_out_y, True, SPREAD,
                PROJECT_Y, CLAMPED_IS_ZERO_Y, ENLARGED, ROWS, BK,
            )  # fmt: skip
