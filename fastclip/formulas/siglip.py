"""SigLIP's loss with ids: every pair is a yes-or-no question, and equal ids are a yes or none."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..engine.checks import check_features
from .info_nce import pair_of
from .reduction import Reduction
from .world import World


def siglip(
    world: World, x: Tensor, y: Tensor, logit_scale: Tensor | float,
    logit_bias: Tensor | float | None, ids: tuple[Tensor, Tensor] | Tensor | None, same_id: str,
    reduction: Reduction,
) -> Tensor:  # fmt: skip
    """The loss of pairs x, y (N, D): half of the row's and half of the column's sum."""

    def check() -> None:
        check_features(x, y, may_be_empty=True)
        reduction.check(x, world)

    world.guarded(check)
    ids = pair_of(ids)
    c = world.contrast(x, y, logit_scale, logit_bias, ids=ids, same_id=same_id, kind="sigmoid")
    losses = (c.rows + c.columns) / 2
    if c.row_positives is None:
        losses = losses + F.softplus(-c.positives, threshold=60)
    else:
        losses = losses + (c.row_positives + c.column_positives) / 2
    return reduction.of(losses, world, (x, y))
