"""The best key of each query's own id: the highest exact score, of equal ones the lowest index.

It takes O(P D) operations for P pairs of equal ids, in chunks of pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..engine.dtypes import state_dtype
from .scores import pair_scores
from .sides import Sides

CHUNK = 1 << 18  # pairs, unless one query alone has more


def best_same_id(sides: Sides) -> tuple[Tensor, Tensor]:
    """Returns the index (M) of each query's best key with its id, -1 without one, and the exact
    score, infinite without one."""
    m, device = len(sides.x), sides.device
    ordered, order = sides.ids_y.sort(stable=True)
    first = torch.searchsorted(ordered, sides.ids_x)
    counts = torch.searchsorted(ordered, sides.ids_x, right=True) - first
    index = torch.full((m,), -1, dtype=torch.int64, device=device)
    score = torch.full((m,), torch.inf, dtype=state_dtype(device), device=device)
    for rows in _chunks(counts):
        of_chunk = counts[rows]
        query = torch.repeat_interleave(of_chunk)  # within the chunk
        within = torch.arange(len(query), device=device) - (of_chunk.cumsum(0) - of_chunk)[query]
        key = order[first[rows][query] + within]
        scores = pair_scores(sides, query + rows.start, key)
        best = scores.new_full(of_chunk.shape, -torch.inf)
        best = best.scatter_reduce(0, query, scores, "amax")
        at_best = torch.where(scores == best[query], key, len(sides.y))
        lowest = torch.full_like(of_chunk, len(sides.y)).scatter_reduce(0, query, at_best, "amin")
        has = of_chunk > 0
        index[rows] = torch.where(has, lowest, -1)
        score[rows] = torch.where(has, best, torch.inf)
    return index, score


def _chunks(counts: Tensor) -> Iterator[slice]:
    """Slices of rows with at most CHUNK pairs each."""
    if not len(counts):
        return
    totals = counts.cumsum(0).cpu()
    start, m = 0, len(counts)
    while start < m:
        done = int(totals[start - 1]) if start else 0
        stop = int(torch.searchsorted(totals, done + CHUNK, right=True))
        stop = max(stop, start + 1)
        yield slice(start, stop)
        start = stop
