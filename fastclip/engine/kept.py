"""The number of rows that a first sweep keeps for the second within a budget, and their tensor.

`keep`, an argument of the operators, is a number of lines of the longer side, each with all its
min(M, N) pairs. `kept`, a result of the sweep, is the tensor that holds them. Only the engine that
made it reads its numbers; checks and FLOP counts read its size and dtype. An engine keeps products,
weights or nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kinds import kind_of
from .block import Block

# Rows are kept in multiples of UNIT, unless all are kept. The distance between kept rows of weights
# is a multiple of UNIT elements, too.
UNIT = 16


def _smaller(a: int, b: int) -> int:
    # `min` of symbolic sizes would compile one order alone. The compilers of torch 2.10 and 2.11
    # refuse `sym_min` of plain sizes: it is an operator of torch that returns no tensor.
    plain = isinstance(a, int) and isinstance(b, int)
    return min(a, b) if plain else torch.sym_min(a, b)


def _padded(n: int) -> int:
    return (n + UNIT - 1) // UNIT * UNIT


def rows_to_keep(m: int, n: int, itemsize: int, budget: int) -> int:
    """Returns `keep` for products and a budget in bytes: a multiple of 16. Each line of the longer
    side that is kept takes min(m, n) numbers."""
    short = _smaller(m, n)
    affordable = budget // (short * itemsize) // UNIT * UNIT
    return _smaller(_padded(m + n - short), affordable)


class Products:
    """Products t_ij in the dtype of their accumulation."""

    @staticmethod
    def dtype(x: Tensor) -> torch.dtype:
        return torch.promote_types(x.dtype, torch.float32)

    @staticmethod
    def keep(block: Block, budget: int) -> int:
        """Returns `keep` for a budget in bytes."""
        itemsize = Products.dtype(block.x.features).itemsize
        return rows_to_keep(*block.sizes(), itemsize, budget)

    @staticmethod
    def empty(x: Tensor, y: Tensor, keep: int) -> Tensor:
        """Returns an empty tensor for `keep` rows."""
        return x.new_empty((keep * _smaller(x.shape[0], y.shape[0]),), dtype=Products.dtype(x))

    @staticmethod
    def made(x: Tensor, y: Tensor, kept: Tensor) -> bool:
        """True if `kept` may come from a sweep of x and y; an empty one may come from any."""
        return kept.dtype == Products.dtype(x) and kept.numel() % min(len(x), len(y)) == 0

    @staticmethod
    def pairs(x: Tensor, y: Tensor, kept: Tensor) -> int:
        """The number of pairs that were kept."""
        return min(kept.numel(), len(x) * len(y))


class Nothing:
    """An engine that keeps nothing."""

    @staticmethod
    def keep(block: Block, budget: int) -> int:
        return 0

    empty = Products.empty  # `keep` is always 0, so this has no elements

    @staticmethod
    def made(x: Tensor, y: Tensor, kept: Tensor) -> bool:
        return False

    pairs = Products.pairs


class Weights:
    """Weights without their coefficients, for the leading rows of x.

    Half features of either dtype keep bfloat16, 2 bytes a pair, since exponentials need float32's
    range; float32 features keep float32.

    The tensor of bytes holds, in this order: the sums of w of every line, then those of w * t
    (float64); the shift that w is relative to (float64); 8 unused bytes; the rows of w.
    `triton_kernels/kept.py` makes views of it.
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
        # A kept weight is one number for each pair. That is not enough with thresholds, where a
        # pair may count for one of its lines only, or with positives by id, which have coefficients
        # of their own, or with levels. The sums of weights that key_bias needs are not kept, nor
        # are a teacher's. float64 goes to the plain PyTorch engine, which keeps nothing.
        apart = block.x.threshold is not None or block.same_id_positive or block.has_teacher()
        apart = apart or kind_of(block.kind).has_levels
        if x.dtype == torch.float64 or apart or block.key_bias is not None:
            return 0
        affordable = (budget - Weights.header(m, n)) // Weights.row(x, n) // UNIT * UNIT
        rows = -_smaller(-_smaller(affordable, m), 0)  # between 0 and m
        # `keep` counts lines of the longer side: n / min(m, n) of them for each row of x.
        short = _smaller(m, n)
        return (rows * n + short - 1) // short

    @staticmethod
    def rows(m: int, n: int, keep: int) -> int:
        """The rows of x that `keep` stands for."""
        return _smaller(keep * _smaller(m, n) // n, m)

    @staticmethod
    def empty(x: Tensor, y: Tensor, keep: int) -> Tensor:
        if x.dtype == torch.float64:
            return Products.empty(x, y, keep)
        m, n = x.shape[0], y.shape[0]
        rows = Weights.rows(m, n, keep)
        # Without rows there is no header. A symbolic number of rows cannot decide an `if`.
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
