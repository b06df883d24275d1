"""Hinges of pairs: all negatives that come within a margin of the positive, or the hardest one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.autograd import refuse_forward_mode, side_of
from ..engine.block import Block
from ..engine.checks import check_features, check_ids, check_number
from ..engine.dtypes import product_dtype
from ..engine.hardest import hardest
from ..engine.pair_similarities import pair_similarities
from ..engine.pairs import codes_of
from .info_nce import pair_of
from .reduction import Reduction
from .world import World

Ids = tuple[Tensor, Tensor] | None


def ranking(
    world: World, x: Tensor, y: Tensor, margin: float, hardest_only: bool, symmetric: bool,
    ids: tuple[Tensor, Tensor] | Tensor | None, normalize: bool, reduction: Reduction,
) -> Tensor:  # fmt: skip
    """The loss of pairs x, y (N, D): similarities have no scale."""
    ids = pair_of(ids)

    def check() -> None:
        check_ranking(world, x, y, margin, ids, reduction)
        refuse_forward_mode(x, y)

    world.guarded(check)
    if hardest_only:
        losses = _of_hardest(world, x, y, margin, symmetric, ids, normalize)
    else:
        c = world.contrast(x, y, 1.0, ids=ids, kind="hinge", above=-margin, columns=symmetric)
        losses = c.rows + c.columns if symmetric else c.rows
    return reduction.of(losses, world, (x, y))


def check_ranking(
    world: World, x: Tensor, y: Tensor, margin: float, ids: Ids, reduction: Reduction
) -> None:
    """Checks the arguments of `ranking`."""
    check_features(x, y, not world.even, ("x", "y"))
    check_ids(ids, "ignore", x, y)
    check_number("margin", margin, 0.0)
    reduction.check(x, world)
    world.check_engine(x, y)


def _of_hardest(
    world: World, x: Tensor, y: Tensor, margin: float, symmetric: bool, ids: Ids, normalize: bool
) -> Tensor:
    """The losses of own pairs. Each line looks for its hardest negative in the batch of all ranks,
    and only that pair and the own one have a gradient."""
    dtype, batch = product_dtype(x, y), world.whole_batch(x, y, ids)
    x_ids, y_ids = ids or (None, None)
    in_one_sweep = symmetric and batch.x is x

    def search(a: Tensor, b: Tensor, of_a: Tensor | None, of_b: Tensor | None) -> list[Tensor]:
        sides = [side_of(t.detach(), dtype, normalize) for t in (a, b)]
        if of_a is not None:
            codes = codes_of(of_a, of_b)
            sides = [side._replace(ids=code) for side, code in zip(sides, codes, strict=True)]
        return hardest(Block(*sides, x.new_ones(()), offset=batch.start), in_one_sweep)

    # The caller's autocast would round the products of the search.
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        found = search(x, batch.y, x_ids, batch.y_ids)
        if symmetric and not in_one_sweep:
            found += search(y, batch.x, y_ids, batch.x_ids)
    # All pairs in one call: a call has gradients of both sides' size, and those of positives and
    # negatives nearly cancel if features are alike, so they are added before they are rounded.
    own = torch.arange(x.shape[0], device=x.device) + batch.start
    places = [own, *(lines.clamp_min(0) for lines in found)]
    i = torch.cat([own, own, *places[2:]])
    j = torch.cat([own, places[1], *([own] if symmetric else [])])
    t = pair_similarities(batch.x, batch.y, i, j, dtype, normalize)
    positives, *others = t.reshape(1 + len(found), x.shape[0])
    return sum(
        torch.where(lines >= 0, F.relu(margin + t - positives), 0)
        for lines, t in zip(found, others, strict=True)
    )
