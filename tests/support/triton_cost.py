"""The cost of the Triton engine's sweeps, counted from the chunks that `plan` launches."""

from __future__ import annotations

from typing import NamedTuple

from fastclip.triton_kernels.configurations import Config
from fastclip.triton_kernels.plan import (
    COLUMN_UNIT,
    KEPT_LAYERS,
    SPLIT_BYTES,
    Chunk,
    cdiv,
    sweep_chunks,
    weigh_chunks,
)


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
