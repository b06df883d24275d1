"""Ranks and best keys, dense and obvious: all scores in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .ranks import Ranks


def dense_ranks(
    queries: Tensor, keys: Tensor, *, offset: int = 0, ids: tuple[Tensor, Tensor] | None = None,
    columns: bool = True,
) -> Ranks:  # fmt: skip
    """`ranks`, over the matrix of scores."""
    scores = _scores(queries, keys)
    i, j = (torch.arange(n, device=scores.device) for n in scores.shape)
    own = i[:, None] + offset == j if ids is None else ids[0][:, None] == ids[1]
    rows = _before(scores, own)
    return Ranks(rows, _before(scores.T, own.T) if columns else None)


def _before(scores: Tensor, own: Tensor) -> Tensor:
    if 0 in scores.shape:
        return torch.full(scores.shape[:1], -1, device=scores.device)
    # In a stable order of scores, the best own key is the first own one.
    order = scores.argsort(dim=1, descending=True, stable=True)
    is_own = own.gather(1, order)
    return torch.where(is_own.any(1), is_own.int().argmax(1), -1)


def dense_topk(
    queries: Tensor, keys: Tensor, k: int, *, ids: tuple[Tensor, Tensor] | None = None,
    max_score: float | None = None, exclude_own: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`topk`, over the matrix of scores."""
    scores = _scores(queries, keys)
    out = scores > (math.inf if max_score is None else max_score)
    if ids is not None:
        out = out | (ids[0][:, None] == ids[1])
    if exclude_own:
        out = out | torch.eye(*scores.shape, dtype=torch.bool, device=scores.device)
    scores = scores.masked_fill(out, -torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    scores = scores.gather(1, order)
    missing = k - scores.shape[1] if scores.shape[1] < k else 0
    order = torch.where(scores == -torch.inf, -1, order)
    pad = torch.nn.functional.pad
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    return pad(scores, (0, missing), value=-torch.inf).to(dtype), pad(order, (0, missing), value=-1)


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Scores (M, N), each summed in the same order, so that equal features tie."""
    rows = [(query * keys.double()).sum(1) for query in queries.double()]
    return torch.stack(rows) if rows else queries.new_zeros(0, len(keys), dtype=torch.float64)
