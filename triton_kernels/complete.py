"""From products of weights and features to gradients: the positive's term, the factor's rest, the
normalisation's Jacobian, gain and scale; and the totals' positives.

    g_i = product_i / (ENLARGED * factor_i) + p_i * partner^_i
    dx_i = gain * scale * factor_i * (g_i - x^_i <x^_i, g_i>)

x^ being x times its factor; without projection gain * scale * g_i. O((M + N) D), a row at a time.

More run-time parameters than fifteen: two towers' rows and one gradient.
"""

import triton
import triton.language as tl

from .tile import stored_as


@triton.jit
def _gradient(
    PRODUCT, PARTNER, i, j, start, D, stride_product, stride_partner, divisor, partner_weight, row,
    has_partner, BK: tl.constexpr,
):  # fmt: skip
    k = start + tl.arange(0, BK)
    mask = row[:, None] & (k < D)[None, :]
    at = i.to(tl.int64)[:, None] * stride_product + k[None, :]
    g = tl.load(PRODUCT + at, mask=mask, other=0.0) * divisor[:, None]
    at = j.to(tl.int64)[:, None] * stride_partner + k[None, :]
    partner = tl.load(PARTNER + at, mask=mask & has_partner[:, None], other=0.0).to(tl.float32)
    return g + tl.where(has_partner[:, None], partner_weight[:, None] * partner, 0.0)


@triton.jit(do_not_specialize=["M", "N", "first", "offset"])
def complete_kernel(
    PRODUCT, X, PARTNER, FX, FP, WEIGHT, GAIN, SCALE, OUT, M, N, D, first, offset, stride_product,
    stride_x, stride_partner, stride_out, BY_PARTNER: tl.constexpr, SPREAD: tl.constexpr,
    PROJECT: tl.constexpr, CLAMPED_IS_ZERO: tl.constexpr, ENLARGED: tl.constexpr,
    ROWS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + M of one tower; the partner of row i is row i + offset of the other's
    N. WEIGHT belongs to the rows, or to the partners (BY_PARTNER). PRODUCT may be OUT: every
    element is read by the program that overwrites it, before it does."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
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
    gain = (tl.load(GAIN).to(tl.float64) * tl.load(SCALE).to(tl.float64)).to(tl.float32)
    multiplier = tl.zeros((ROWS,), tl.float32) + gain
    # A norm below 1e-12 was clamped: the features were divided by a constant.
    clamped = factor >= 0.9999e12
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
            # 1e12 times anything overflows fp16: a zero row has no gradient, not an infinite one.
            g = tl.where(clamped[:, None], 0.0, g)
        out = OUT + i.to(tl.int64)[:, None] * stride_out + (start + tl.arange(0, BK))[None, :]
        tl.store(out, stored_as(g, OUT), mask=mask)


@triton.jit(do_not_specialize=["M", "N", "offset"])
def complete_totals_kernel(TOTALS, WEIGHT, POSITIVE, GAIN, OUT, M, N, offset, LANES: tl.constexpr):
    """gain times the sums of w and of w * t, those of the positives included."""
    lane = tl.arange(0, LANES)
    w, wt = tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.float64)
    for start in range(0, M, LANES):
        i = start + lane
        here = (i < M) & (i + offset >= 0) & (i + offset < N)
        p = tl.load(WEIGHT + i, mask=here, other=0.0).to(tl.float64)
        w += p
        wt += p * tl.load(POSITIVE + i, mask=here, other=0.0)
    gain = tl.load(GAIN).to(tl.float64)
    tl.store(OUT, gain * (tl.load(TOTALS) + tl.sum(w, 0)))
    tl.store(OUT + 1, gain * (tl.load(TOTALS + 1) + tl.sum(wt, 0)))
