"""The supervised contrastive loss, fused and dense."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine.dense import dense_logits, reduce_lines
from ..formulas.reduction import Reduction
from ..formulas.supcon import supcon
from .base import one_process


def supcon_loss(
    features: Tensor,  # (N, D)
    labels: Tensor,  # (N)
    logit_scale: Tensor | float,
    *,
    decoupled: bool = False,
    weights: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """The supervised contrastive loss without its N x N matrix. Equivalent to:

        logits = logit_scale * features @ features.T
        others = ~torch.eye(N, dtype=torch.bool)
        positives = (labels[:, None] == labels) & others
        total = logits.masked_fill(~others, -math.inf).logsumexp(1)
        each = total - (logits * positives).sum(1) / positives.sum(1)
        loss = each[positives.any(1)].mean()

    (Khosla et al., arXiv 2004.11362, the "out" form, without its factor of the temperature.) An
    anchor without positives counts neither in the sum nor in the mean.

    Args:
        features: (N, D), all views of all samples.
        labels: (N), integers: features with equal labels are positives of each other.
        logit_scale: already exponentiated, 1 / temperature.
        decoupled: leaves positives out of the log-sum-exp.
        weights: (N), floating point: multiplies the anchors' losses; the mean divides by the sum of
            those that count.
        normalize, reduction, backend, memory_budget: as in `clip_loss`.

    Returns, Raises: as `info_nce`. With reduction "none" an anchor without positives has loss 0.
    Without any positives at all the loss is 0.
    """
    world = one_process(normalize, backend, memory_budget)
    return supcon(world, features, labels, logit_scale, decoupled, Reduction(reduction, weights))


def dense_supcon_loss(
    features: Tensor,  # (N, D)
    labels: Tensor,  # (N)
    logit_scale: Tensor | float,
    *,
    decoupled: bool = False,
    weights: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """`supcon_loss` with its N x N matrix.

    Args: as `supcon_loss`; backend and memory_budget are ignored.
    """
    logits = dense_logits(features, features, logit_scale, None, normalize)
    others = ~torch.eye(logits.shape[0], dtype=torch.bool, device=logits.device)
    positives = (labels[:, None] == labels) & others
    counted = others & ~positives if decoupled else others
    total = logits.masked_fill(~counted, -torch.inf).logsumexp(1)
    number = positives.sum(1)
    losses = total - (logits * positives).sum(1) / number.clamp_min(1)
    return reduce_lines(torch.where(number > 0, losses, 0), reduction, weights, number > 0)
