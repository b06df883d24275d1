"""Plans the chunks of both sweeps and counts their cost: plain arithmetic on sizes.

The engine launches what this module plans, and tests check it: passes, traffic and the bounds of
memory at N = 1M can be counted without a card.

Beside states and gradients, O((M + N) D), memory is bounded by two limits:

    partial sums     at most PARTIAL_BYTES, or one row of tiles
    weights          at most WEIGHT_BYTES, WEIGHT_ROWS x WEIGHT_COLUMNS

For each chunk of C x W weights, the products read and write C rows of dx and W rows of dy once
more: 8 (C + W) D bytes against 4 C W D FLOPs, a ratio that is least for C = W. 11,264 are 88 tiles
of 128: at D = 768 each product is two full waves of 128 x 256 tiles on 132 processors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .configurations import Config

# A block with fewer pairs is small: launches cost it more than a second exponential a pair.
SMALL_PAIRS = 1 << 23

PARTIAL_BYTES = 128 << 20
WEIGHT_BYTES = 256 << 20
WEIGHT_ROWS = WEIGHT_COLUMNS = 11264
# A chunk of weights has a multiple of ROW_UNIT rows, unless it is the last. Its rows lie a
# multiple of COLUMN_UNIT elements apart.
ROW_UNIT, COLUMN_UNIT = 128, 16
# Partials of a line in each tile: its sum; if weights are kept, also the sums of w and of w * t; if
# lines have shifts of their own, also its shift.
LAYERS, KEPT_LAYERS, MAXIMA_LAYERS = 1, 3, 2
# The limit of a launch in one dimension.
MOST_PROGRAMS = (1 << 31) - 1

# An fp32 product made of bf16 products (`split_product.py`): their number, and the bytes of a
# number that is split into parts.
SPLIT_PRODUCTS, SPLIT_BYTES = 6, 6

# Programs of a kernel that rarely has to work: enough to fill any card when it does.
SELDOM_PROGRAMS = 1024


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


class Chunk(NamedTuple):
    """The rows and columns of a block that one launch takes, and the size of their tiles."""

    start: int
    stop: int
    column_start: int
    column_stop: int
    bm: int
    bn: int
    kept: bool = False  # the first sweep keeps its weights, the second reads them

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def columns(self) -> int:
        return self.column_stop - self.column_start

    @property
    def row_slice(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def column_slice(self) -> slice:
        return slice(self.column_start, self.column_stop)

    @property
    def tiles_m(self) -> int:
        return cdiv(self.rows, self.bm)

    @property
    def tiles_n(self) -> int:
        return cdiv(self.columns, self.bn)

    @property
    def tiles(self) -> int:
        return self.tiles_m * self.tiles_n

    def skipped(self, offset: int) -> int:
        """Returns how many whole tiles of each row of tiles the diagonal may pass through. The
        positive of row i is column i + offset."""
        full_m, full_n = self.rows // self.bm, self.columns // self.bn
        if offset + full_m * self.bm <= 0 or offset >= full_n * self.bn:
            return 0
        touched = cdiv(self.bm - 1, self.bn) + 1
        if self.bm % self.bn == 0 and offset % self.bn == 0:
            touched = self.bm // self.bn
        elif self.bn % self.bm == 0 and offset % self.bm == 0:
            touched = 1
        return min(touched, full_n)

    def plain_tiles(self, skipped: int) -> int:
        """Returns the number of its whole tiles without the skipped ones."""
        return self.rows // self.bm * (self.columns // self.bn - skipped)

    @property
    def partials(self) -> int:
        """The numbers in one layer of its lines' partial sums."""
        return self.tiles_n * self.rows + self.tiles_m * self.columns


def is_small(m: int, n: int) -> bool:
    return m * n < SMALL_PAIRS


def sweep_rows(n: int, config: Config, layers: int) -> int:
    """Returns the rows of a chunk whose partial sums, `layers` numbers each, fit PARTIAL_BYTES."""
    tiles_n = cdiv(n, config.bn)
    row_of_tiles = 4 * layers * (tiles_n * config.bm + n)
    tiles_m = min(PARTIAL_BYTES // row_of_tiles, MOST_PROGRAMS // tiles_n)
    return max(1, tiles_m) * config.bm


def sweep_chunks(
    n: int, config: Config, layers: int, start: int, stop: int, kept: bool = False
) -> list[Chunk]:
    """Returns chunks of the first sweep for rows start .. stop. Chunks have whole rows, so that a
    row's sums are complete in its chunk. layers: partials of a line in each tile."""
    step = sweep_rows(n, config, layers)
    return [
        Chunk(first, min(first + step, stop), 0, n, config.bm, config.bn, kept)
        for first in range(start, stop, step)
    ]


def weight_shape(m: int, n: int, itemsize: int) -> tuple[int, int]:
    """Returns the rows and columns of a chunk of weights."""
    columns = min(n, WEIGHT_COLUMNS)
    stride = cdiv(columns, COLUMN_UNIT) * COLUMN_UNIT
    rows = min(WEIGHT_BYTES // (itemsize * stride), WEIGHT_ROWS) // ROW_UNIT * ROW_UNIT
    return min(m, max(rows, ROW_UNIT)), columns


def weigh_chunks(
    m: int, n: int, config: Config, itemsize: int, kept_rows: int = 0
) -> Iterator[Chunk]:
    """Yields chunks of weights, row after row. Kept rows and others do not share a chunk. If both
    sweeps are done in one go their partial sums fit, too: they are far fewer than the weights."""
    rows, columns = weight_shape(m, n, itemsize)
    kept_rows = min(kept_rows, m)
    for first, last, kept in ((0, kept_rows, True), (kept_rows, m, False)):
        for start in range(first, last, rows):
            for column in range(0, n, columns):
                within = (column, min(column + columns, n))
                yield Chunk(start, min(start + rows, last), *within, config.bm, config.bn, kept)


class Cost(NamedTuple):
    """FLOPs, bytes moved and bytes of work space of a list of launches."""

    flops: int
    bytes: int
    work_space: int

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            max(self.work_space, other.work_space),
        )


def _features(chunk: Chunk, config: Config, d: int, itemsize: int) -> int:
    """Returns the bytes of features that the product of a chunk reads, if L2 holds just what one
    group of rows of tiles shares: x once, y once for every group."""
    groups = cdiv(chunk.tiles_m, config.group)
    return itemsize * d * (chunk.rows + groups * chunk.columns)


def sweep_cost(
    m: int, n: int, d: int, config: Config, itemsize: int, layers: int, kept_rows: int = 0,
    products: int = 1,
) -> Cost:  # fmt: skip
    """Returns the cost of the first sweep with one shift. Partial sums are written and read once;
    there are three times as many if weights are kept. products: the bf16 products that make up one
    product of features; if there are several, features and weights, except kept weights, take
    SPLIT_BYTES."""
    kept_itemsize, itemsize = itemsize, itemsize if products == 1 else SPLIT_BYTES
    kept_rows = min(kept_rows, m)
    kept = sweep_chunks(n, config, KEPT_LAYERS, 0, kept_rows, kept=True)
    chunks = kept + sweep_chunks(n, config, layers, kept_rows, m)
    moved = sum(_features(c, config, d, itemsize) + 8 * c.partials for c in chunks)
    moved += sum(16 * c.partials + kept_itemsize * c.rows * c.columns for c in kept)
    flops = sum(2 * products * c.rows * c.columns * d for c in chunks)
    work = max(4 * (KEPT_LAYERS if c.kept else layers) * c.partials for c in chunks)
    return _with_parts(Cost(flops, moved, work), (m + n) * d, products)


def _with_parts(cost: Cost, features: int, products: int) -> Cost:
    """Returns the cost with that of splitting all features into parts, which is done once."""
    if products == 1:
        return cost
    made = SPLIT_BYTES * features
    return Cost(cost.flops, cost.bytes + 4 * features + made, cost.work_space + made)


def weigh_cost(
    m: int, n: int, d: int, config: Config, itemsize: int, kept_rows: int = 0,
    needs_x: bool = True, needs_y: bool = True, fold: bool = False, products: int = 1,
) -> Cost:  # fmt: skip
    """Returns the cost of the second sweep, or of both in one go (fold). Weights are written once
    and read by each product; the products' accumulators are read if they are added to. products:
    as for the first sweep."""
    kept_itemsize, itemsize = itemsize, itemsize if products == 1 else SPLIT_BYTES
    flops = moved = work = 0
    for c in weigh_chunks(m, n, config, itemsize, kept_rows):
        pairs = c.rows * c.columns
        flops += 2 * products * pairs * d * ((not c.kept) + needs_x + needs_y)
        moved += kept_itemsize * pairs if c.kept else _features(c, config, d, itemsize)
        moved += itemsize * pairs * (needs_x + needs_y + (needs_x or needs_y))
        moved += fold * 8 * c.partials
        for needed, lines, others, begins in (
            (needs_x, c.rows, c.columns, c.column_start == 0),
            (needs_y, c.columns, c.rows, c.start == 0),
        ):
            moved += needed * d * (lines * (4 if begins else 8) + others * itemsize)
        stride = cdiv(c.columns, COLUMN_UNIT) * COLUMN_UNIT
        space = itemsize * c.rows * stride * (needs_x or needs_y) + 4 * fold * c.partials
        work = max(work, space + 4 * needs_x * c.rows * d + 4 * needs_y * n * d)
    return _with_parts(Cost(flops, moved, work), (m + n) * d, products)
