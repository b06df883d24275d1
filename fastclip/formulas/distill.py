"""Distillation: the cross-entropy of lines with a teacher's softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.checks import check_features, check_sides
from .reduction import Reduction
from .world import World

Scale = Tensor | float


def distill(
    world: World, x: Tensor, y: Tensor, logit_scale: Scale, teacher_x: Tensor, teacher_y: Tensor,
    teacher_scale: Scale, symmetric: bool, reduction: Reduction,
) -> Tensor:  # fmt: skip
    """The loss of rows x (M, D) against y (N, D), or of pairs, both ways."""

    def check() -> None:
        check_sides(x, y, may_be_empty=not world.even)
        if symmetric:
            check_features(x, y, not world.even, ("x", "y"))
        reduction.check(x, world)

    world.guarded(check)
    targets = (teacher_x, teacher_y, teacher_scale)
    c = world.contrast(x, y, logit_scale, offset=None, columns=symmetric, targets=targets)
    losses = c.rows - c.row_expectations
    if symmetric:
        losses = (losses + c.columns - c.column_expectations) / 2
    return reduction.of(losses, world, (x, y))


def distill_clip(
    world: World, x: Tensor, y: Tensor, logit_scale: Scale, teacher_x: Tensor, teacher_y: Tensor,
    teacher_scale: Scale, reduction: Reduction,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """CLIP's loss and the distillation loss of pairs x, y (N, D), from one sweep."""

    def check() -> None:
        check_features(x, y, may_be_empty=not world.even)
        reduction.check(x, world)

    world.guarded(check)
    c = world.contrast(x, y, logit_scale, targets=(teacher_x, teacher_y, teacher_scale))
    found = []
    for lines, expected in ((c.rows, c.row_expectations), (c.columns, c.column_expectations)):
        gap = lines - c.positives
        found.append((
            F.softplus(gap, threshold=60),
            torch.logaddexp(lines, c.positives) - expected,
        ))  # fmt: skip
    (clip_rows, rows), (clip_columns, columns) = found
    contrastive, distilled = (clip_rows + clip_columns) / 2, (rows + columns) / 2
    return tuple(reduction.of(losses, world, (x, y)) for losses in (contrastive, distilled))
