"""What is launched on which part of a block, and what it moves: plain arithmetic on sizes.

The engine asks here and does nothing else; tests ask here, too, so that the passes, the traffic and
the bounds of memory at N = 1M need no card to be counted.

Two bounds hold memory besides the states and gradients, O((M + N) D):

    partial sums     at most PARTIAL_BYTES, or one row of tiles
    weights          at most WEIGHT_BYTES, WEIGHT_ROWS x WEIGHT_COLUMNS

A chunk of C x W weights costs its products one more reading and writing of C rows of dx and W rows
of dy, 8 (C + W) D bytes against 4 C W D FLOPs: least where C = W. 11,264 are 88 tiles of 128: at
D = 768 each product is two full waves of 128 x 256 tiles on 132 processors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .configurations import Config

# Below so many pairs a block is small: launches cost it more than a second exponential a pair.
SMALL_PAIRS = 1 << 23

PARTIAL_BYTES = 128 << 20
WEIGHT_BYTES = 256 << 20
WEIGHT_ROWS = WEIGHT_COLUMNS = 11264
# Rows of weights come in multiples of this, and rows of them lie this many elements apart.
ROW_UNIT, COLUMN_UNIT = 128, 16
# Numbers of a line in each tile: what it remembers; where weights are kept, sums of w and of w * t;
# where lines have shifts of their own, these.
LAYERS, KEPT_LAYERS, MAXIMA_LAYERS = 1, 3, 2
# Most a launch may have in one dimension.
MOST_PROGRAMS = (1 << 31) - 1

# An fp32 product made of bf16 ones: products, and bytes of a number in parts (`split.py`).
SPLIT_PRODUCTS, SPLIT_BYTES = 6, 6

# Programs of a kernel that as a rule returns at once: enough to fill any card when it does not.
SELDOM_PROGRAMS = 1024


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


class Chunk(NamedTuple):
    """A part of a block that one launch takes: rows and columns, and the tiles it is cut into."""

    start: int
    stop: int
    column_start: int
    column_stop: int
    bm: int
    bn: int
    kept: bool = False  # its weights are kept, or read

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
        """How many whole tiles of a row of tiles the diagonal may pass through; the positive of row
        i is column i + offset."""
        full_m, full_n = self.rows // self.bm, self.columns // self.bn
        if offset + full_m * self.bm <= 0 or offset >= full_n * self.bn:
            return 0
        touched = cdiv(self.bm - 1, self.bn) + 1
        if self.bm % self.bn == 0 and offset % self.bn == 0:
            touched = self.bm // self.bn
        elif self.bn % self.bm == 0 and offset % self.bm == 0:
            touched = 1
        return min(touched, full_n)

    def plain(self, skipped: int) -> int:
        """Its whole tiles but for the skipped ones."""
        return self.rows // self.bm * (self.columns // self.bn - skipped)

    @property
    def partials(self) -> int:
        """Numbers that its lines' partial sums take."""
        return self.tiles_n * self.rows + self.tiles_m * self.columns


def is_small(m: int, n: int) -> bool:
    return m * n < SMALL_PAIRS


def sweep_rows(n: int, config: Config, layers: int) -> int:
    """Rows of a chunk whose partial sums, `layers` numbers each, fit PARTIAL_BYTES."""
    tiles_n = cdiv(n, config.bn)
    row_of_tiles = 4 * layers * (tiles_n * config.bm + n)
    tiles_m = min(PARTIAL_BYTES // row_of_tiles, MOST_PROGRAMS // tiles_n)
    return max(1, tiles_m) * config.bm


def sweep(
    n: int, config: Config, layers: int, start: int, stop: int, kept: bool = False
) -> list[Chunk]:
    """Rows start .. stop, and whole rows: their sums are complete in their chunk. layers: numbers
    that a line has in each tile."""
    step = sweep_rows(n, config, layers)
    return [
        Chunk(first, min(first + step, stop), 0, n, config.bm, config.bn, kept)
        for first in range(start, stop, step)
    ]


def weight_shape(m: int, n: int, itemsize: int) -> tuple[int, int]:
    """Rows and columns of a chunk of weights."""
    columns = min(n, WEIGHT_COLUMNS)
    stride = cdiv(columns, COLUMN_UNIT) * COLUMN_UNIT
    rows = min(WEIGHT_BYTES // (itemsize * stride), WEIGHT_ROWS) // ROW_UNIT * ROW_UNIT
    return min(m, max(rows, ROW_UNIT)), columns


def weigh(m: int, n: int, config: Config, itemsize: int, kept_rows: int = 0) -> Iterator[Chunk]:
    """Chunks of weights, row after row. Kept rows and others do not share a chunk. The partial sums
    of a sweep in the same go have room: a chunk's are far fewer than its weights."""
    rows, columns = weight_shape(m, n, itemsize)
    kept_rows = min(kept_rows, m)
    for first, last, kept in ((0, kept_rows, True), (kept_rows, m, False)):
        for start in range(first, last, rows):
            for column in range(0, n, columns):
                within = (column, min(column + columns, n))
                yield Chunk(start, min(start + rows, last), *within, config.bm, config.bn, kept)


class Cost(NamedTuple):
    """FLOPs and bytes of device memory that a list of launches comes to."""

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
    """Bytes of features that the product of a chunk reads, if L2 holds what one group of rows of
    tiles shares, and no more: x once, y once for every group."""
    groups = cdiv(chunk.tiles_m, config.group)
    return itemsize * d * (chunk.rows + groups * chunk.columns)


def sweep_cost(
    m: int, n: int, d: int, config: Config, itemsize: int, layers: int, kept_rows: int = 0,
    products: int = 1,
) -> Cost:  # fmt: skip
    """Returns the first sweep's, with one shift. Partial sums are written and read once, three
    times as many where weights are kept. products: that one of the features is made of; if several,
    they and their weights have SPLIT_BYTES, but for those that are kept."""
    kept_itemsize, itemsize = itemsize, itemsize if products == 1 else SPLIT_BYTES
    kept_rows = min(kept_rows, m)
    kept = sweep(n, config, KEPT_LAYERS, 0, kept_rows, kept=True)
    chunks = kept + sweep(n, config, layers, kept_rows, m)
    moved = sum(_features(c, config, d, itemsize) + 8 * c.partials for c in chunks)
    moved += sum(16 * c.partials + kept_itemsize * c.rows * c.columns for c in kept)
    flops = sum(2 * products * c.rows * c.columns * d for c in chunks)
    work = max(4 * (KEPT_LAYERS if c.kept else layers) * c.partials for c in chunks)
    return _with_parts(Cost(flops, moved, work), (m + n) * d, products)


def _with_parts(cost: Cost, features: int, products: int) -> Cost:
    """With the parts of all features beside it, made of them and written once."""
    if products == 1:
        return cost
    made = SPLIT_BYTES * features
    return Cost(cost.flops, cost.bytes + 4 * features + made, cost.work_space + made)


def weigh_cost(
    m: int, n: int, d: int, config: Config, itemsize: int, kept_rows: int = 0,
    needs_x: bool = True, needs_y: bool = True, fold: bool = False, products: int = 1,
) -> Cost:  # fmt: skip
    """Returns the second sweep's, or that of both in one go (fold): the weights' tiles, written
    once and read by each product; the products' accumulators, read where they are added to.
    products: as for the first sweep."""
    kept_itemsize, itemsize = itemsize, itemsize if products == 1 else SPLIT_BYTES
    flops = moved = work = 0
    for c in weigh(m, n, config, itemsize, kept_rows):
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
