"""The best partner of each query: the highest exact score, of equal ones the lowest index.

It takes O(P D) operations for P pairs of partners. Pairs of equal ids are made in chunks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..engine.dtypes import state_dtype
from .scores import pair_scores
from .sides import Sides

CHUNK = 1 << 18  # pairs, unless one query alone has more


def best_of_pairs(
    sides: Sides, query: Tensor, key: Tensor, first: int, m: int
) -> tuple[Tensor, ...]:
    """Returns the index of the best partner, -1 without one, and its exact score, infinite without
    one, of the m queries from `first` on. query, key (P): the pairs."""
    n, device = len(sides.y), sides.device
    scores = pair_scores(sides, query, key)
    line = query - first
    best = scores.new_full((m,), -torch.inf).scatter_reduce(0, line, scores, "amax")
    at_best = torch.where(scores == best[line], key, n)
    index = torch.full((m,), n, device=device).scatter_reduce(0, line, at_best, "amin")
    return torch.where(index == n, -1, index), torch.where(index == n, torch.inf, best)


def best_same_id(sides: Sides) -> tuple[Tensor, Tensor]:
    """Returns the index (M) of each query's best key with its id, and the exact score."""
    m, device = len(sides.x), sides.device
    ordered, order = sides.ids_y.sort(stable=True)
    first = torch.searchsorted(ordered, sides.ids_x)
    counts = torch.searchsorted(ordered, sides.ids_x, right=True) - first
    index = torch.empty(m, dtype=torch.int64, device=device)
    score = torch.empty(m, dtype=state_dtype(device), device=device)
    for rows in _chunks(counts):
        of_chunk = counts[rows]
        query = torch.repeat_interleave(of_chunk)  # within the chunk
        within = torch.arange(len(query), device=device) - (of_chunk.cumsum(0) - of_chunk)[query]
        key = order[first[rows][query] + within]
        found = best_of_pairs(sides, query + rows.start, key, rows.start, len(of_chunk))
        index[rows], score[rows] = found
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
