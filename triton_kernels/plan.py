"""Plans the chunks of both sweeps: plain arithmetic on sizes.

Tests count passes, traffic and memory of these chunks up to N = 1M, without a card.

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

# A block with fewer pairs is small: a second exponential for each pair costs it less time than the
# launches that would save that exponential.
SMALL_PAIRS = 1 << 23

PARTIAL_BYTES = 128 << 20
WEIGHT_BYTES = 256 << 20
WEIGHT_ROWS = WEIGHT_COLUMNS = 11264
# A chunk of weights has a multiple of ROW_UNIT rows, unless it ends the kept rows or the block. Its
# rows lie a multiple of COLUMN_UNIT elements apart.
ROW_UNIT, COLUMN_UNIT = 128, 16
# Partials of a line in each tile: its sum; if weights are kept, also the sums of w and of w * t; if
# lines have numbers of their own, both numbers of its state.
LAYERS, KEPT_LAYERS, APART_LAYERS = 1, 3, 2
# Those of a teacher: its shift, and the sums of e' and of e' * t.
TEACHER_LAYERS = 3
# The limit of a launch in one dimension.
MOST_PROGRAMS = (1 << 31) - 1

# The bytes of an fp32 number that is split into bf16 parts (`kernels/split_product.py`).
SPLIT_BYTES = 6

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
