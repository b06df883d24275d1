"""The second sweep of weights that the first one kept."""

import triton
import triton.language as tl

from .flags import is_set
from .logits import column_values, row_values
from .weigh import store_weights


@triton.jit(do_not_specialize=["M", "N"], do_not_specialize_on_alignment=["A", "B"])
def weigh_kept_kernel(
    KEPT, FACTORS, VALID, A, B, W, M, N, stride_kept, stride_w, SPREAD: tl.constexpr,
    ENLARGED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Multiplies the weights that the first sweep has kept by (a_i + b_j) and stores them. Their
    sums come from the moments that were kept with them. Returns at once unless VALID is set."""
    if is_set(VALID, True) == 0:
        return
    tiles_n = tl.cdiv(N, BN)
    pid_m = tl.program_id(0) // tiles_n
    row, column = pid_m * BM, (tl.program_id(0) - pid_m * tiles_n) * BN
    i, j = row + tl.arange(0, BM), column + tl.arange(0, BN)
    mask = (i < M)[:, None] & (j // 8 < tl.cdiv(N, 8))[None, :]
    w = tl.load(KEPT + i.to(tl.int64)[:, None] * stride_kept + j[None, :], mask=mask, other=0.0)
    a, b = row_values(A, i, M, False), column_values(B, j, N, False)
    w = w.to(tl.float32) * (a + b)
    store_weights(
        W, w, FACTORS, row, column, M, N, stride_w, False, False, SPREAD, ENLARGED, PRECISION, BM,
        BN,
    )  # fmt: skip
