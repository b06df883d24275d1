"""Ranks of own pairs: how many keys score above each query's own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.compile_marks import no_compile
from . import operators, plain_ranks, swept_ranks
from .own import Own, own_partners, own_partners_of_keys
from .scores import operand_rounding
from .sides import Sides, check_pairs, sides_of


class Ranks(NamedTuple):
    """int64, from 0; -1 for a line without an own pair.

    rows (M): how many keys come before each query's own.
    columns (N): how many queries come before each key's own; None if not wanted.
    """

    rows: Tensor
    columns: Tensor | None


@no_compile
def ranks(
    queries: Tensor,  # (M, D)
    keys: Tensor,  # (N, D)
    *,
    offset: int = 0,
    ids: tuple[Tensor, Tensor] | None = None,
    pairs: Tensor | None = None,
    columns: bool = True,
    normalize: bool = False,
    backend: str | None = None,
) -> Ranks:
    """Returns how many keys score above each query's own key, and the same for the keys.

        ranks(queries, keys).rows

    computes the same as

        scores = queries.double() @ keys.double().T
        own = scores.diagonal()[:, None]
        j = torch.arange(len(keys))
        before = (scores > own) | ((scores == own) & (j < j[:, None]))
        rows = before.sum(1)

    in memory O(M + N), with both directions from one sweep. R@k is `(rows < k).float().mean()`.

    Args:
        queries, keys: float64, float32, bfloat16 or float16, any strides; mixed dtypes promote.
        offset: the own key of query i is key i + offset.
        ids: (query_ids (M), key_ids (N)), integers. The own key of a query is then the best one of
            its id, and other keys of that id are not counted: several captions of an image, or
            several images of a class. offset must be 0.
        pairs: (P, 2), integers, in place of ids: queries and keys that belong together, each in any
            number of pairs. The own key of a query is its best partner, and its other partners are
            not counted.
        columns: whether to rank the queries of each key, too.
        normalize: divide features by max(norm, 1e-12) first.
        backend: as in `clip_loss`. The CPU engine has kernels of its own; elsewhere library
            products in chunks serve.

    Raises:
        TypeError: features or ids that are not tensors, or have another dtype.
        ValueError: shapes or devices that do not fit, features that are not finite, an offset
            beside ids or pairs, a backend that cannot run here.
    """
    if (ids is not None or pairs is not None) and offset != 0:
        raise ValueError(f"ids and pairs take the place of offset, which must be 0, got {offset}")
    if ids is not None and pairs is not None:
        raise ValueError("pairs take the place of ids, got both")
    sides = sides_of(queries, keys, ids, offset, normalize, backend)
    if pairs is not None:
        sides = sides._replace(pairs=check_pairs(pairs, sides.x, sides.y))
    with torch.no_grad(), torch.autocast(sides.device.type, enabled=False):
        of_rows = own_partners(sides)
        of_columns = own_partners_of_keys(sides, of_rows) if columns else None
        return without_strays(count(sides, of_rows, of_columns), of_rows, of_columns)


def count(sides: Sides, of_rows: Own, of_columns: Own | None, first_query: int = 0) -> Ranks:
    """Counts the pairs that come before own ones, for lines without one, too. No other pair of the
    same id comes before the best one. first_query: the index of query 0, as of_columns counts, for
    a block of a larger matrix."""
    if sides.is_empty:
        lines = [of_rows] if of_columns is None else [of_rows, of_columns]
        found = [torch.zeros_like(own.index) for own in lines]
    elif sides.compiled:
        columns = (None, None) if of_columns is None else of_columns
        found = operators.ranks(
            sides.x, sides.y, *of_rows, *columns, first_query, operand_rounding(sides.device)
        )
    else:
        # A sweep could not leave out the best partners, and would leave every line open.
        plain = sides.engine in ("torch", "reference") or sides.pairs is not None
        counts = plain_ranks.counts if plain else swept_ranks.counts
        found = counts(sides, of_rows, of_columns, first_query)
    return Ranks(found[0], None if of_columns is None else found[1])


def without_strays(found: Ranks, of_rows: Own, of_columns: Own | None) -> Ranks:
    """Returns the ranks with -1 for the lines that have no own pair."""
    rows = torch.where(of_rows.index < 0, -1, found.rows)
    if of_columns is None:
        return Ranks(rows, None)
    return Ranks(rows, torch.where(of_columns.index < 0, -1, found.columns))
