"""NT-Xent: two views of each sample, contrasted with both views of all others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.autograd import is_traced
from ..engine.checks import check_features
from .reduction import Reduction
from .world import World

# On CPUs a view of so many rows is contrasted with itself in halves. Below, the calls take more
# time than they save; above, the gradients of the parts, together as large as that of the view,
# take more memory than the time is worth.
HALVED = range(4096, 16385)


def nt_xent(
    world: World, x1: Tensor, x2: Tensor, logit_scale: Tensor | float, decoupled: bool,
    reduction: Reduction,
) -> Tensor:  # fmt: skip
    """The loss of views x1, x2 (N, D): the mean of 2N lines."""

    def check() -> None:
        check_features(x1, x2, not world.even, ("x1", "x2"))
        reduction.check(x1, world)
        world.check_engine(x1, x2)

    world.guarded(check)
    within = [_within(world, view, logit_scale) for view in (x1, x2)]
    # Beside halves, keeping products was measured to be slower: 2.5 s, and 2.3 s without.
    budget = {"memory_budget": 0} if _is_halved(world, x1) else {}
    # x2 against x1 is the transpose of this block: its columns. It comes last, so that its
    # gradients come first and those within the views are added to them.
    between = world.contrast(x1, x2, logit_scale, **budget)
    losses = []
    for others, own in zip((between.rows, between.columns), within, strict=True):
        gap = torch.logaddexp(others, own) - between.positives
        losses.append(gap if decoupled else F.softplus(gap, threshold=60))
    return reduction.of((losses[0] + losses[1]) / 2, world, (x1, x2))


def _is_halved(world: World, view: Tensor) -> bool:
    # Ranks would exchange each part; a graph would hold the parts of one size.
    whole = is_traced() or world.ranks > 1 or view.device.type != "cpu"
    return not whole and view.shape[0] in HALVED


def _within(world: World, view: Tensor, logit_scale: Tensor | float) -> Tensor:
    """The log-sum-exps of each row's pairs with the other rows. The pairs of two halves are
    computed once for the rows of both."""
    if not _is_halved(world, view):
        return world.contrast(view, None, logit_scale, memory_budget=0).rows
    n = view.shape[0]
    halves = view.split((n // 2, n - n // 2))
    across = world.contrast(*halves, logit_scale, offset=None, memory_budget=0)
    found = zip(halves, (across.rows, across.columns), strict=True)
    return torch.cat([
        torch.logaddexp(_within(world, half, logit_scale), lines) for half, lines in found
    ])  # fmt: skip
