"""The k best keys of each query, for search and for the mining of hard negatives."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from ..engine.compile_marks import no_compile
from . import operators, plain_top
from .scores import operand_rounding
from .sides import Sides, sides_of


@no_compile
def topk(
    queries: Tensor,  # (M, D)
    keys: Tensor,  # (N, D)
    k: int,
    *,
    ids: tuple[Tensor, Tensor] | None = None,
    max_score: float | None = None,
    exclude_own: bool = False,
    normalize: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the scores and indices of the k best keys of each query.

        topk(queries, keys, k)

    computes the same as

        scores = queries.double() @ keys.double().T
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
        scores.gather(1, order), order

    in memory O(M k + N).

    Args:
        queries, keys: float64, float32, bfloat16 or float16, any strides; mixed dtypes promote.
        k: how many keys, at least 1. It may exceed N.
        ids: (query_ids (M), key_ids (N)), integers. Keys with the id of the query are left out:
            for hard negatives, all its positives.
        max_score: keys with a higher score are left out, such as likely false negatives.
        exclude_own: whether to leave key i out for query i: a search among the queries themselves.
        normalize: divide features by max(norm, 1e-12) first.
        backend: as in `clip_loss`. The CPU engine has kernels of its own; elsewhere library
            products in chunks and torch.topk serve.

    Returns:
        Scores (M, k), float64 for float64 features and float32 for others, descending, and indices
        (M, k), int64. The lower index comes first among equal scores. A query that has fewer keys
        ends with scores of -inf and indices of -1.

    Raises:
        TypeError: features or ids that are not tensors, or have another dtype.
        ValueError: shapes or devices that do not fit, features that are not finite, a k below 1, a
            max_score that is not a finite number, a backend that cannot run here.
    """
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k < 2**31:
        raise ValueError(f"k must be an integer from 1 to 2^31 - 1, got {k!r}")
    is_number = isinstance(max_score, Real) and not isinstance(max_score, bool)
    if max_score is not None and not (is_number and abs(max_score) < math.inf):
        raise ValueError(f"max_score must be a finite number or None, got {max_score!r}")
    limit = math.inf if max_score is None else float(max_score)
    sides = sides_of(queries, keys, ids, 0, normalize, backend)
    with torch.no_grad(), torch.autocast(sides.device.type, enabled=False):
        scores, indices = _found(sides, k, limit, bool(exclude_own))
    return scores.to(torch.float64 if sides.x.dtype == torch.float64 else torch.float32), indices


def _found(sides: Sides, k: int, limit: float, exclude_own: bool) -> tuple[Tensor, Tensor]:
    if sides.compiled:
        rounding = operand_rounding(sides.device)
        return operators.topk(
            sides.x, sides.y, k, limit, sides.ids_x, sides.ids_y, exclude_own, rounding
        )
    return plain_top.topk(sides, k, limit, exclude_own)
