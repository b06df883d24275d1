"""Ranks by the fused engines of GPUs: a sweep counts the pairs above each line's level.

The sweep of the kind "hinge" returns such counts (`engine/operators.py`). One sweep has levels that
only pairs above their line's own score for certain exceed, another has levels that all pairs exceed
that may be above. Lines whose two counts differ are ranked by plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine import operators
from ..engine.block import NO_POSITIVES, Block, Side
from ..kinds import LOG2E
from . import plain_ranks
from .own import Own
from .scores import bands, product_error
from .sides import Sides


def counts(
    sides: Sides, of_rows: Own, of_columns: Own | None, first_query: int
) -> tuple[Tensor, ...]:
    """`plain_ranks.counts`, by the engine of the sides."""
    m = len(sides.x)
    # Levels in log2 units and differences to them are rounded, too. GPUs flush denormals.
    band = torch.cat(bands(sides, 2 * product_error(sides))).to(of_rows.score.dtype) + 1e-30
    score = of_rows.score
    if of_columns is None:
        score = torch.cat((score, score.new_full((len(sides.y),), torch.inf)))
    else:
        score = torch.cat((score, of_columns.score))
    certain, possible = (_above(sides, level * LOG2E) for level in (score + band, score - band))
    # If products may overflow, they may also be NaN, which no level counts.
    unsure = (certain != possible) | band.isinf()
    rows = unsure[:m].nonzero()[:, 0]
    certain[rows] = _settled(sides, of_rows, rows)
    if of_columns is None:
        return (certain[:m],)
    lines = unsure[m:].nonzero()[:, 0]
    own = of_columns._replace(index=of_columns.index - first_query)
    certain[m + lines] = _settled(sides.swapped(), own, lines)
    return certain[:m], certain[m:]


def _above(sides: Sides, levels: Tensor) -> Tensor:
    """How many pairs exceed the levels (M + N) of their lines, int64; without own pairs."""
    offset = sides.offset if sides.ids_x is None else NO_POSITIVES
    block = Block(
        Side(sides.x, ids=sides.ids_x), Side(sides.y, ids=sides.ids_y),
        torch.ones((), dtype=levels.dtype, device=sides.device), offset=offset, kind="hinge",
    )  # fmt: skip
    return operators.sweep(sides.engine, block, levels=levels).state[0].long()


def _settled(sides: Sides, own: Own, lines: Tensor) -> Tensor:
    """The counts of chosen queries, by plain PyTorch."""
    if not len(lines):
        return lines
    some = Sides(sides.x[lines], sides.y, None, None, 0, "torch")
    return plain_ranks.counts(some, Own(own.index[lines], own.score[lines]), None, 0)[0]
