"""NT-Xent: two views of each sample, contrasted with both views of all others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.checks import budget_of, check_features
from .reduction import Reduction
from .world import World


def nt_xent(
    world: World, x1: Tensor, x2: Tensor, logit_scale: Tensor | float, decoupled: bool,
    reduction: Reduction,
) -> Tensor:  # fmt: skip
    """The loss of views x1, x2 (N, D): the mean of 2N lines."""

    def check() -> int:
        check_features(x1, x2, not world.even, ("x1", "x2"))
        reduction.check(x1, world)
        # The three blocks share the budget.
        return budget_of(world.memory_budget, x1.device) // 3

    budget = world.guarded(check)
    # x2 against x1 is the transpose of the first block: its columns.
    between = world.contrast(x1, x2, logit_scale, memory_budget=budget)
    losses = []
    for others, view in ((between.rows, x1), (between.columns, x2)):
        within = world.contrast(view, None, logit_scale, memory_budget=budget).rows
        gap = torch.logaddexp(others, within) - between.positives
        losses.append(gap if decoupled else F.softplus(gap, threshold=60))
    return reduction.of((losses[0] + losses[1]) / 2, world, (x1, x2))
