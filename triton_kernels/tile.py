"""A tile of t_ij = <x_i, y_j> * factor_x_i * factor_y_j, and which of its pairs count.

Rows and columns past an edge are computed from row or column 0 instead of being masked, so that
loads stay wide; `live` takes them out of every sum afterwards. The only mask in the product is for
the last step along D, and none where the step divides D.
"""

import triton
import triton.language as tl

from .epilogues import INTERPRETED


@triton.jit
def rounded(x, BITS: tl.constexpr):
    """Without the last BITS of the mantissa, 13 for tf32 and 16 for bf16: to nearest even, where
    tensor cores would truncate."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + ((1 << (BITS - 1)) - 1) + ((bits >> BITS) & 1)) & -(1 << BITS)
    # Infinities and NaN stay.
    return tl.where(tl.abs(x) < float("inf"), bits.to(tl.float32, bitcast=True), x)


@triton.jit
def stored_as(x, POINTER):
    # A card rounds; the interpreter's conversion to bf16 truncates.
    if INTERPRETED and POINTER.dtype.element_ty == tl.bfloat16:
        x = rounded(x, 16)
    return x.to(POINTER.dtype.element_ty)


@triton.jit
def position(pid, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Tile of a program: GROUP rows of tiles at a time, column after column, so that programs that
    run together share features in L2."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = pid // (GROUP * tiles_n)
    within = pid - group * (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    column = within // height
    return group * GROUP + within - column * height, column


@triton.jit
def product(
    X, Y, i, j, M, N, D, stride_x, stride_y, BK: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j> for the rows i and columns j, accumulated in fp32.

    D and the strides count UNIT elements: the compiler then knows that rows begin on 16 bytes.
    """
    k = tl.arange(0, BK)
    # A batch may hold more than 2^31 numbers.
    x = X + tl.where(i < M, i, 0).to(tl.int64)[:, None] * stride_x * UNIT + k[None, :]
    y = Y + tl.where(j < N, j, 0).to(tl.int64)[None, :] * stride_y * UNIT + k[:, None]
    t = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    for start in range(0, D * UNIT, BK):
        if EVEN:
            a, b = tl.load(x), tl.load(y)
        else:
            a = tl.load(x, mask=(start + k < D * UNIT)[None, :], other=0.0)
            b = tl.load(y, mask=(start + k < D * UNIT)[:, None], other=0.0)
        # The interpreter would multiply the bit patterns of bf16.
        if INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        t = tl.dot(a, b, t, input_precision=PRECISION)
        x += BK
        y += BK
    return t


@triton.jit
def normalised(t, FX, FY, i, j, M, N):
    if FX is not None:
        t *= tl.load(FX + i, mask=i < M, other=0.0)[:, None]
    if FY is not None:
        t *= tl.load(FY + j, mask=j < N, other=0.0)[None, :]
    return t


@triton.jit
def has_positives(i, j, offset):
    """Whether the diagonal passes through the tile of rows i and columns j."""
    first, last = tl.min(i, 0) + offset, tl.max(i, 0) + offset
    return (first <= tl.max(j, 0)) & (last >= tl.min(j, 0))


@triton.jit
def negatives(i, j, M, N, offset):
    """The pairs that count: within the block and not positive.

    Masked in every tile: a branch around it, which only tiles on an edge or the diagonal would
    take, keeps both outcomes alive and made the compiler spill.
    """
    inside = (i < M)[:, None] & (j < N)[None, :]
    return inside & ((i + offset)[:, None] != j[None, :])
