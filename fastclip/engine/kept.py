"""What a first sweep keeps for the second one: how many rows a budget holds, and in which tensor.

`keep`, the operators' argument, counts rows along the longer side; `kept`, their result, is opaque
to all but the engine that made it. Engines keep one of three things: products, weights, nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block import Block

# Rows are kept in multiples of this; rows of weights lie a multiple of it apart.
UNIT = 16


def _smaller(a: int, b: int) -> int:
    # Of symbolic sizes `min` would compile one order alone. Of plain ones `sym_min` is refused by
    # the compilers of torch 2.10 and 2.11: it is an operator of torch that returns no tensor.
    plain = isinstance(a, int) and isinstance(b, int)
    return min(a, b) if plain else torch.sym_min(a, b)


def _padded(n: int) -> int:
    return (n + UNIT - 1) // UNIT * UNIT


def rows_to_keep(m: int, n: int, itemsize: int, budget: int) -> int:
    """`keep` of products for a budget in bytes: whole rows of t, along the longer side, in steps of
    16."""
    short = _smaller(m, n)
    affordable = budget // (short * itemsize) // UNIT * UNIT
    return _smaller(_padded(m + n - short), affordable)


class Products:
    """t = <x^_i, y^_j> in the dtype that it was accumulated in."""

    @staticmethod
    def dtype(x: Tensor) -> torch.dtype:
        return torch.promote_types(x.dtype, torch.float32)

    @staticmethod
    def keep(block: Block, budget: int) -> int:
        """`keep` for a budget in bytes."""
        itemsize = Products.dtype(block.x.features).itemsize
        return rows_to_keep(*block.sizes(), itemsize, budget)

    @staticmethod
    def empty(x: Tensor, y: Tensor, keep: int) -> Tensor:
        """What `keep` asks for, not yet filled in."""
        return x.new_empty((keep * _smaller(x.shape[0], y.shape[0]),), dtype=Products.dtype(x))

    @staticmethod
    def made(x: Tensor, y: Tensor, kept: Tensor) -> bool:
        """True if a sweep of x and y may have made it; an empty one is anybody's."""
        return kept.dtype == Products.dtype(x) and kept.numel() % min(len(x), len(y)) == 0

    @staticmethod
    def pairs(x: Tensor, y: Tensor, kept: Tensor) -> int:
        """How many pairs were kept."""
        return min(kept.numel(), len(x) * len(y))


class Nothing:
    @staticmethod
    def keep(block: Block, budget: int) -> int:
        return 0

    empty = Products.empty

    @staticmethod
    def made(x: Tensor, y: Tensor, kept: Tensor) -> bool:
        return False

    pairs = Products.pairs


class Weights:
    """Weights up to their coefficients, of leading rows of x: 2 bytes a pair for half features, as
    bfloat16 whichever they are, since exponentials need float32's range; else 4, as float32.

    A tensor of bytes: sums of w and of w * t for every line, float64; the reference that w is
    relative to, float64; the rows.
    """

    @staticmethod
    def dtype(x: Tensor) -> torch.dtype:
        return torch.bfloat16 if x.dtype.itemsize == 2 else torch.float32

    @staticmethod
    def header(m: int, n: int) -> int:
        return 16 * (m + n + 1)

    @staticmethod
    def row(x: Tensor, n: int) -> int:
        return _padded(n) * Weights.dtype(x).itemsize

    @staticmethod
    def keep(block: Block, budget: int) -> int:
        x, (m, n) = block.x.features, block.sizes()
        # float64 is the plain engine's. One weight serves a pair's row and column, and its kind,
        # and columns' sums of weights are not kept.
        apart = block.x.threshold is not None or block.same_id_positive
        if x.dtype == torch.float64 or apart or block.key_bias is not None:
            return 0
        affordable = (budget - Weights.header(m, n)) // Weights.row(x, n) // UNIT * UNIT
        rows = -_smaller(-_smaller(affordable, m), 0)
        # Along the longer side they count n / min(m, n) times as many.
        short = _smaller(m, n)
        return (rows * n + short - 1) // short

    @staticmethod
    def rows(m: int, n: int, keep: int) -> int:
        """Rows of x that `keep` comes to."""
        return _smaller(keep * _smaller(m, n) // n, m)

    @staticmethod
    def empty(x: Tensor, y: Tensor, keep: int) -> Tensor:
        if x.dtype == torch.float64:
            return Products.empty(x, y, keep)
        m, n = x.shape[0], y.shape[0]
        rows = Weights.rows(m, n, keep)
        # No rows, no header: in arithmetic, since a symbolic number of rows decides nothing.
        size = _smaller(rows, 1) * Weights.header(m, n) + rows * Weights.row(x, n)
        return x.new_empty((size,), dtype=torch.uint8)

    @staticmethod
    def pairs(x: Tensor, y: Tensor, kept: Tensor) -> int:
        bytes_of_rows = max(0, kept.numel() - Weights.header(len(x), len(y)))
        return bytes_of_rows // Weights.row(x, len(y)) * len(y)

    @staticmethod
    def made(x: Tensor, y: Tensor, kept: Tensor) -> bool:
        rows = kept.numel() - Weights.header(len(x), len(y))
        return kept.dtype == torch.uint8 and rows > 0 and rows % Weights.row(x, len(y)) == 0


KEPT_BY = {"cpu": Products, "cuda": Products, "torch": Nothing, "triton": Weights}
