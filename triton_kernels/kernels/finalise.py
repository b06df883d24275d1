"""Adds partial sums up into states: in float64, in a fixed order, whichever program ends first.

Each program owns LINES lines of a chunk: all rows come first, then all columns. If a line lies in
several chunks, each chunk's launch adds to the line's state. The order is fixed, since launches on
one stream run one after another.
"""

import triton
import triton.language as tl

from .flags import is_set

# The least sum that one shift gets right: the terms that such a line has lost lie below fp32's
# resolution of its sum.
LEAST = tl.constexpr(2.0**-78)
LARGEST = tl.constexpr(2.0**127)
# A sum relative to its largest term lies between this and LARGEST, unless the logits have outgrown
# their dtype.
LEAST_RELATIVE = tl.constexpr(2.0**-100)


@triton.jit
def power_of_two(k):
    """Returns 2^k for an integral float64 k <= 0, and 0 below float64's normal range or for NaN."""
    k = tl.where(k >= -1022, k, -1023.0)
    return ((k.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def lines_of_program(
    M, N, tiles_m, tiles_n, row_start, column_start, rows_total, LINES: tl.constexpr
):
    """Returns for this program: True if its lines are rows; its lines; the place of their first
    partials and of their states; the chunk's number of such lines; the partials of each line."""
    programs_of_rows = tl.cdiv(M, LINES)
    is_row = tl.program_id(0) < programs_of_rows
    first = tl.program_id(0) - tl.where(is_row, 0, programs_of_rows)
    line = first * LINES + tl.arange(0, LINES)
    length = tl.where(is_row, M, N)
    base = tl.where(is_row, 0, tiles_n.to(tl.int64) * M)
    out = tl.where(is_row, row_start, rows_total + column_start) + line
    return is_row, line, base, out, length, tl.where(is_row, tiles_n, tiles_m)


@triton.jit
def _has_others(is_row, out, rows_total, columns_total, offset):
    """True for a line that has a negative: the other side has a line besides its own positive."""
    i = tl.where(is_row, out, out - rows_total - offset)
    own = (i >= 0) & (i < rows_total) & (i + offset >= 0) & (i + offset < columns_total)
    return tl.where(is_row, columns_total, rows_total) > own.to(tl.int32)


@triton.jit
def _sum_of_partials(PARTIAL, line, length, count, LINES: tl.constexpr, PARTIALS: tl.constexpr):
    """Returns the sum of each line's `count` partials, PARTIALS at a time."""
    index = tl.arange(0, PARTIALS)
    total = tl.zeros((LINES,), tl.float64)
    for p in range(0, count, PARTIALS):
        at = (p + index).to(tl.int64)[:, None] * length + line[None, :]
        mask = (p + index < count)[:, None] & (line < length)[None, :]
        total += tl.sum(tl.load(PARTIAL + at, mask=mask, other=0.0).to(tl.float64), 0)
    return total


SIZES = ["M", "N", "tiles_m", "tiles_n", "row_start", "column_start", "rows_total"]
SIZES += ["columns_total", "offset", "fresh_rows", "fresh_columns", "is_last"]


@triton.jit(do_not_specialize=SIZES)
def sums_kernel(
    PARTIAL, STATE, OCCUPIED, SHIFT, FLAG, M, N, tiles_m, tiles_n, row_start, column_start,
    rows_total, columns_total, offset, fresh_rows, fresh_columns, is_last, LINES: tl.constexpr,
    PARTIALS: tl.constexpr,
):  # fmt: skip
    """Adds up partials that share one shift, or have none. With a SHIFT, chunks are whole rows, and
    FLAG is set if the shift is not finite, or if a line with pairs has a sum outside LEAST ..
    LARGEST: a sum below LEAST may have lost terms that matter. OCCUPIED marks the lines with pairs;
    without it these are the lines that have a negative."""
    is_row, line, base, out, length, count = lines_of_program(
        M, N, tiles_m, tiles_n, row_start, column_start, rows_total, LINES
    )
    mask = line < length
    lines = rows_total + columns_total
    fresh = tl.where(is_row, fresh_rows, fresh_columns)
    total = _sum_of_partials(PARTIAL + base, line, length, count, LINES, PARTIALS)
    total += tl.load(STATE + lines + out, mask=mask & (fresh == 0), other=0.0)
    tl.store(STATE + lines + out, total, mask=mask)
    shift = tl.zeros((LINES,), tl.float64)
    if SHIFT is not None:
        shift += tl.load(SHIFT)
        if is_row | (is_last != 0):
            occupied = _has_others(is_row, out, rows_total, columns_total, offset)
            if OCCUPIED is not None:
                occupied = tl.load(OCCUPIED + out, mask=mask, other=0) != 0
            holds = (occupied == 0) | ((total >= LEAST) & (total <= LARGEST))
            holds &= shift - shift == 0.0
            if tl.max((mask & (holds == 0)).to(tl.int32), 0) > 0:
                tl.store(FLAG, 1)
    tl.store(STATE + out, shift, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def moments_kernel(
    PARTIAL, MOMENTS, KEPT_SHIFT, M, N, tiles_m, tiles_n, row_start, column_start, rows_total,
    columns_total, fresh_rows, fresh_columns, is_last, FIRST: tl.constexpr, LINES: tl.constexpr,
    PARTIALS: tl.constexpr,
):  # fmt: skip
    """Adds up two numbers for each line, (2, rows_total + columns_total), whose layers of partials
    begin with layer FIRST: the kept w and w * t, or how many pairs lie above the line's level and
    how far. Exponentials may reach 2^100: if w * t overflows, a NaN in KEPT_SHIFT invalidates
    everything that was kept."""
    is_row, line, base, out, length, count = lines_of_program(
        M, N, tiles_m, tiles_n, row_start, column_start, rows_total, LINES
    )
    layer = tiles_n.to(tl.int64) * M + tiles_m.to(tl.int64) * N
    mask = line < length
    old = mask & (tl.where(is_row, fresh_rows, fresh_columns) == 0)
    for moment in tl.static_range(2):
        total = _sum_of_partials(
            PARTIAL + (FIRST + moment) * layer + base, line, length, count, LINES, PARTIALS
        )
        if KEPT_SHIFT is not None:
            overflows = mask & ((tl.abs(total) < float("inf")) == 0)
            if tl.max(overflows.to(tl.int32), 0) > 0:
                tl.store(KEPT_SHIFT, float("nan"))
        at = MOMENTS + moment * (rows_total + columns_total) + out
        tl.store(at, total + tl.load(at, mask=old, other=0.0), mask=mask)


@triton.jit
def _merge(shift, other_shift):
    """Returns the shift of two merged states and the factors of their sums; a state without terms
    has shift -inf."""
    top = tl.maximum(shift, other_shift)
    mine = tl.where(shift == float("-inf"), 1.0, power_of_two(shift - top))
    theirs = tl.where(other_shift == float("-inf"), 1.0, power_of_two(other_shift - top))
    return top, mine, theirs


@triton.jit(do_not_specialize=SIZES)
def maxima_sums_kernel(
    PARTIAL, STATE, FLAG, KEPT_SHIFT, M, N, tiles_m, tiles_n, row_start, column_start,
    rows_total, columns_total, fresh_rows, fresh_columns, is_last, TAUGHT: tl.constexpr,
    LINES: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Adds up partial sums that have shifts of their own. The shifts lie in the first layer, the
    sums in the second, and with TAUGHT second sums in the third. With a FLAG this writes only if
    the flag is set; it then also invalidates the kept weights, which are relative to the one
    shift."""
    if is_set(FLAG, True) == 0:
        return
    if KEPT_SHIFT is not None:
        tl.store(KEPT_SHIFT, float("nan"))
    is_row, line, base, out, length, count = lines_of_program(
        M, N, tiles_m, tiles_n, row_start, column_start, rows_total, LINES
    )
    layer = tiles_n.to(tl.int64) * M + tiles_m.to(tl.int64) * N
    SUMS = PARTIAL + layer
    index = tl.arange(0, PARTIALS)
    mask = line < length
    lines = rows_total + columns_total
    fresh = tl.where(is_row, fresh_rows, fresh_columns)
    # The stored state of a line without terms has sum 0 and shift 0.
    total = tl.load(STATE + lines + out, mask=mask & (fresh == 0), other=0.0)
    shift = tl.load(STATE + out, mask=mask & (fresh == 0), other=0.0)
    shift = tl.where(total == 0, float("-inf"), shift)
    if TAUGHT:
        second = tl.load(STATE + 2 * lines + out, mask=mask & (fresh == 0), other=0.0)
    for p in range(0, count, PARTIALS):
        at = base + (p + index).to(tl.int64)[:, None] * length + line[None, :]
        within = (p + index < count)[:, None] & mask[None, :]
        sums = tl.load(SUMS + at, mask=within, other=0.0).to(tl.float64)
        shifts = tl.load(PARTIAL + at, mask=within, other=float("-inf")).to(tl.float64)
        top = tl.max(shifts, 0)
        weight = power_of_two(shifts - top[None, :])
        weight = tl.where(shifts == float("-inf"), 1.0, weight)
        shift, mine, theirs = _merge(shift, top)
        total = total * mine + tl.sum(sums * weight, 0) * theirs
        if TAUGHT:
            sums = tl.load(SUMS + layer + at, mask=within, other=0.0).to(tl.float64)
            second = second * mine + tl.sum(sums * weight, 0) * theirs
    absent = shift == float("-inf")
    if is_row | (is_last != 0):
        sound = absent | ((total >= LEAST_RELATIVE) & (total <= LARGEST))
        total = tl.where(sound, total, float("nan"))
    if TAUGHT:
        tl.store(STATE + 2 * lines + out, second, mask=mask)
    tl.store(STATE + lines + out, total, mask=mask)
    tl.store(STATE + out, tl.where(absent, 0.0, shift), mask=mask)


@triton.jit
def sum_of_totals(PARTIAL, tiles, LANES: tl.constexpr):
    """Returns the sum over tiles, in float64."""
    lane = tl.arange(0, LANES)
    total = tl.zeros((LANES,), tl.float64)
    for start in range(0, tiles, LANES):
        here = tl.load(PARTIAL + start + lane, mask=start + lane < tiles, other=0.0)
        total += here.to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def tiles_written(FLAG, tiles, tiles_otherwise):
    """Returns how many tiles wrote totals: `tiles` if FLAG is absent or set."""
    return tl.where(is_set(FLAG, True), tiles, tiles_otherwise)


@triton.jit(do_not_specialize=["tiles", "tiles_otherwise", "is_first"])
def totals_kernel(PARTIAL, TOTALS, FLAG, tiles, tiles_otherwise, is_first, LANES: tl.constexpr):
    """Adds the sums of w and of w * t, (2, tiles), to the totals of earlier chunks."""
    tiles = tiles_written(FLAG, tiles, tiles_otherwise)
    sum = sum_of_totals(PARTIAL + tl.program_id(0).to(tl.int64) * tiles, tiles, LANES)
    if is_first == 0:
        sum += tl.load(TOTALS + tl.program_id(0))
    tl.store(TOTALS + tl.program_id(0), sum)


@triton.jit(do_not_specialize=["N", "tiles", "tiles_otherwise", "is_first"])
def columns_kernel(
    PARTIAL, OUT, FLAG, N, tiles, tiles_otherwise, is_first, LINES: tl.constexpr,
    PARTIALS: tl.constexpr,
):  # fmt: skip
    """Adds the sums of w of each column, (tiles, N), to those of earlier chunks."""
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    mask = line < N
    total = _sum_of_partials(
        PARTIAL, line, N, tiles_written(FLAG, tiles, tiles_otherwise), LINES, PARTIALS
    )
    total += tl.load(OUT + line, mask=mask & (is_first == 0), other=0.0)
    tl.store(OUT + line, total, mask=mask)


@triton.jit(do_not_specialize=["lines"])
def lines_kernel(SHIFTS, COEFFICIENTS, KEPT_SHIFT, FLAGS, OUT, lines, LANES: tl.constexpr):
    """Prepares lines for the second sweep. Stores their coefficients in fp32. The last program sets
    two flags: FLAGS[0] if all shifts are equal, positives by id included, so that one exponential
    serves; FLAGS[1] if the kept weights are valid, that is, relative to that shift."""
    programs = tl.cdiv(lines, LANES)
    lane = tl.arange(0, LANES)
    if tl.program_id(0) < programs:
        line = tl.program_id(0) * LANES + lane
        value = tl.load(COEFFICIENTS + line, mask=line < lines, other=0.0)
        tl.store(OUT + line, value.to(tl.float32), mask=line < lines)
    else:
        valid = 1
        if SHIFTS is not None:
            shift = tl.load(SHIFTS)
            differs = tl.zeros((LANES,), tl.int32)
            for start in range(0, lines, LANES):
                at = start + lane
                other = tl.load(SHIFTS + at, mask=at < lines, other=shift)
                differs += (other != shift).to(tl.int32)
            one = (tl.max(differs, 0) == 0).to(tl.int32)
            tl.store(FLAGS, one)
            if KEPT_SHIFT is not None:
                valid = one * (tl.load(KEPT_SHIFT) == shift).to(tl.int32)
        tl.store(FLAGS + 1, valid)


@triton.jit(do_not_specialize=["lines", "period", "stride"])
def finish_kernel(
    STATE, POSITIVE, SCALE, BIAS, LOSSES, COEFFICIENTS, WEIGHTS, lines, period, stride,
    FINISH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Turns states of lines into losses, coefficients and the positives' weights. Line i has the
    positive i % period: rows and columns may share positives."""
    line = tl.program_id(0) * LANES + tl.arange(0, LANES)
    mask = line < lines
    shift = tl.load(STATE + line, mask=mask, other=0.0)
    total = tl.load(STATE + stride + line, mask=mask, other=1.0)
    s = tl.load(POSITIVE + line % period, mask=mask, other=0.0)
    s *= tl.load(SCALE).to(tl.float64)
    if BIAS is not None:
        s += tl.load(BIAS).to(tl.float64)
    loss, coefficient, weight = FINISH(shift, total, s)
    tl.store(LOSSES + line, loss, mask=mask)
    tl.store(COEFFICIENTS + line, coefficient, mask=mask)
    tl.store(WEIGHTS + line, weight, mask=mask)
