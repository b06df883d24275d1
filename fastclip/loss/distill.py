"""The distillation loss, fused and dense."""

from __future__ import annotations

from torch import Tensor

from ..engine.dense import dense_logits, reduce_lines
from ..formulas.distill import distill
from ..formulas.reduction import Reduction
from .base import one_process


def distill_loss(
    x: Tensor,  # (M, D)
    y: Tensor,  # (N, D)
    logit_scale: Tensor | float,
    teacher_x: Tensor,  # (M, D')
    teacher_y: Tensor,  # (N, D')
    teacher_scale: Tensor | float,
    *,
    symmetric: bool = True,
    weights: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """The cross-entropy of each line's softmax with the teacher's, without an (M, N) matrix of
    either. Equivalent to:

        logits = logit_scale * x @ y.T
        targets = teacher_scale * teacher_x @ teacher_y.T
        rows = -(targets.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        columns = -(targets.softmax(0) * logits.log_softmax(0)).sum(0).mean()
        loss = (rows + columns) / 2

    (open_clip's `DistillClipLoss`; Hinton et al., arXiv 1503.02531.)

    Args:
        x, y: (M, D), (N, D), the student's features.
        logit_scale, teacher_scale: already exponentiated; numbers or tensors of one element.
        teacher_x, teacher_y: (M, D'), (N, D'), the teacher's features, without gradients. Mixed
            dtypes of all four promote: a float32 teacher makes a bfloat16 student's products
            float32, which is slower. Under autocast all have its dtype.
        symmetric: True needs M == N and takes the mean of both directions; False: rows alone.
        weights: (M), floating point: multiplies the lines' losses; the mean divides by its sum.
        normalize: divide rows of all four by max(norm, 1e-12) first.
        reduction, backend, memory_budget: as in `clip_loss`.

    Returns, Raises: as `info_nce`.
    """
    world = one_process(normalize, backend, memory_budget)
    return distill(
        world, x, y, logit_scale, teacher_x, teacher_y, teacher_scale, symmetric,
        Reduction(reduction, weights),
    )  # fmt: skip


def dense_distill_loss(
    x: Tensor,  # (M, D)
    y: Tensor,  # (N, D)
    logit_scale: Tensor | float,
    teacher_x: Tensor,  # (M, D')
    teacher_y: Tensor,  # (N, D')
    teacher_scale: Tensor | float,
    *,
    symmetric: bool = True,
    weights: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """`distill_loss` with its (M, N) matrices.

    Args: as `distill_loss`; backend and memory_budget are ignored.
    """
    logits = dense_logits(x, y, logit_scale, None, normalize)
    targets = dense_logits(
        teacher_x.detach(), teacher_y.detach(), teacher_scale, None, normalize
    ).detach()
    directions = (1, 0) if symmetric else (1,)
    losses = [-(targets.softmax(k) * logits.log_softmax(k)).sum(k) for k in directions]
    return reduce_lines(sum(losses) / len(losses), reduction, weights)
