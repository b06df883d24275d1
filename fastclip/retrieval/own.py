"""The own partners of one side's lines."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .best_partner import best_of_pairs, best_same_id
from .scores import own_scores
from .sides import Sides


class Own(NamedTuple):
    """Indices of the own partners (M), -1 for none, and their exact scores, infinite for none."""

    index: Tensor
    score: Tensor


def own_partners(sides: Sides) -> Own:
    """Returns the own key of each query: by offset, or the best of its partners."""
    if sides.pairs is not None:
        return Own(*best_of_pairs(sides, *sides.pairs.unbind(1), 0, len(sides.x)))
    if sides.ids_x is not None:
        return Own(*best_same_id(sides))
    own = sides.own()
    return Own(own, own_scores(sides, own))


def own_partners_of_keys(sides: Sides, of_rows: Own) -> Own:
    """Returns the own query of each key; of_rows are the queries' own keys."""
    if sides.pairs is not None or sides.ids_x is not None or sides.is_empty:
        return own_partners(sides.swapped())
    own = sides.swapped().own()
    score = of_rows.score[own.clamp_min(0)]
    return Own(own, torch.where(own < 0, torch.inf, score))
