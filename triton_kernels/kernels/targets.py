"""A tile of the products of targets, computed beside the tile of <x_i, y_j>.

Kernels take two tuples, or None for both. TARGETS: the two operands, their strides and their width
in units of TARGET_UNIT elements. TARGET_LOGITS: the LOGITS of `logits.py`, with the targets'
factors and, for a teacher, its scale; a guide has none.
"""

import triton
import triton.language as tl

from .logits import normalised
from .tile import product

X, Y, STRIDE_X, STRIDE_Y, WIDTH = (tl.constexpr(place) for place in range(5))


@triton.jit
def target_products(
    TARGETS, TARGET_LOGITS, row, column, M, N, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Returns t' of a tile, with the factors."""
    i, j = row + tl.arange(0, BM), column + tl.arange(0, BN)
    t = product(
        TARGETS[X], TARGETS[Y], row, column, M, N, TARGETS[WIDTH], TARGETS[STRIDE_X],
        TARGETS[STRIDE_Y], False, BM, BN, BK, EVEN, PRECISION, UNIT,
    )  # fmt: skip
    return normalised(t, TARGET_LOGITS, i, j, M, N, False)


@triton.jit
def all_pairs(i, j, M, N):
    """True for the pairs of the block, own positives included."""
    return (i < M)[:, None] & (j < N)[None, :]
