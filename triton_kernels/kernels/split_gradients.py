"""Multiplies weights and features that are both split into bf16 parts.

In other arithmetics a library makes these products. Its bf16 product sums thousands of steps on
tensor cores before it rounds once, and loses ten times what an fp32 product does
(`split_product.py`).
"""

import triton
import triton.language as tl

from .split_product import add_product
from .tile import position


@triton.jit(do_not_specialize=["M", "K"])
def split_gradient_kernel(
    W, X, OUT, M, K, stride_w, stride_out, D: tl.constexpr, WIDTH: tl.constexpr,
    TRANSPOSED: tl.constexpr, BEGINS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """OUT (M, D) = W @ X if it BEGINS, else OUT += W @ X. W is (M, K), or (K, M) if TRANSPOSED. The
    parts of a row of W lie stride_w apart, those of X (K, D) lie WIDTH apart. Rows of W are padded
    with zeros to a multiple of 8, so that eight neighbours are loaded or none. Nothing is loaded
    past the last row: that memory may hold anything."""
    tiles_n = tl.cdiv(D, BN)
    pid_m, pid_n = position(tl.program_id(0), tl.cdiv(M, BM), tiles_n, GROUP)
    i, j = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    column = (j // 8 < WIDTH // 8)[None, :]
    x = X + k.to(tl.int64)[:, None] * (3 * WIDTH) + j[None, :]
    if TRANSPOSED:
        w = W + k.to(tl.int64)[None, :] * (3 * stride_w) + i[:, None]
        row = (i // 8 < tl.cdiv(M, 8))[:, None]
    else:
        w = W + i.to(tl.int64)[:, None] * (3 * stride_w) + k[None, :]
        row = (i < M)[:, None]
    t = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        here = start + k < K
        along = here if TRANSPOSED else (start + k) // 8 < tl.cdiv(K, 8)
        mask_w, mask_x = row & along[None, :], here[:, None] & column
        t = add_product(
            t,
            tl.load(w, mask=mask_w, other=0.0),
            tl.load(w + stride_w, mask=mask_w, other=0.0),
            tl.load(w + 2 * stride_w, mask=mask_w, other=0.0),
            tl.load(x, mask=mask_x, other=0.0),
            tl.load(x + WIDTH, mask=mask_x, other=0.0),
            tl.load(x + 2 * WIDTH, mask=mask_x, other=0.0),
        )
        if TRANSPOSED:
            w += BK * 3 * stride_w.to(tl.int64)
        else:
            w += BK
        x += BK * 3 * WIDTH
    out = OUT + i.to(tl.int64)[:, None] * stride_out + j[None, :]
    mask = (i < M)[:, None] & (j < D)[None, :]
    if not BEGINS:
        t += tl.load(out, mask=mask, other=0.0)
    tl.store(out, t, mask=mask)
