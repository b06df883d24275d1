"""Ranks in plain PyTorch. A chunk's products decide what their error cannot change, and
`pair_scores` decides the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from .chunks import chunks_of
from .own import Own
from .scores import bands, pair_scores, product_error
from .sides import Sides


def counts(
    sides: Sides, of_rows: Own, of_columns: Own | None, first_query: int
) -> tuple[Tensor, ...]:
    """Returns how many keys come before each query's own (M) and, with of_columns, how many queries
    before each key's own (N). `ranks.count` documents the arguments."""
    band_x, band_y = bands(sides, product_error(sides))
    rows = torch.zeros(len(sides.x), dtype=torch.int64, device=sides.device)
    columns = torch.zeros(len(sides.y), dtype=torch.int64, device=sides.device)
    for part, t in chunks_of(sides):
        above, near = _decided(t, of_rows.score[part, None], band_x[part, None])
        rows[part] += above.sum(1)
        either = near
        if of_columns is not None:
            above_columns, near_columns = _decided(t, of_columns.score, band_y)
            columns += above_columns.sum(0)
            either = near | near_columns
        query, key = either.nonzero(as_tuple=True)
        scores = pair_scores(sides, query + part.start, key)
        first = _comes_first(scores, key, of_rows, query + part.start) & near[query, key]
        rows.index_add_(0, query + part.start, first.long())
        if of_columns is not None:
            place = query + part.start + first_query
            first = _comes_first(scores, place, of_columns, key) & near_columns[query, key]
            columns.index_add_(0, key, first.long())
    return (rows,) if of_columns is None else (rows, columns)


def _decided(t: Tensor, own: Tensor, band: Tensor) -> tuple[Tensor, Tensor]:
    """Masks of the pairs above their lines' own for certain, and of those that are too near. If
    products may overflow, the band is infinite, and all are near."""
    difference = t - own.to(t.dtype)
    above = difference > band
    return above, ~(above | (difference < -band))  # so is a NaN


def _comes_first(scores: Tensor, index: Tensor, own: Own, lines: Tensor) -> Tensor:
    score = own.score[lines]
    return (scores > score) | ((scores == score) & (index < own.index[lines]))
