"""The losses in plain PyTorch, as one writes them without a library.

Inputs are x (M, D) and y (N, D), N >= M; the positive of row i is column i. For the losses of
`losses.FAMILY` M and N are equal.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHECKPOINT_ROWS = 1024
MARGIN = 0.2  # of the ranking losses: fastclip's default


def dense_clip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """CLIP's loss from one logit matrix and its transpose."""
    logits = scale * x @ y.T
    labels = torch.arange(len(x), device=x.device)
    own_columns = logits[:, : len(x)]
    return (F.cross_entropy(logits, labels) + F.cross_entropy(own_columns.T, labels)) / 2


def dense_siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss from one logit matrix."""
    logits = scale * x @ y.T + bias
    labels = 2 * torch.eye(len(x), dtype=logits.dtype, device=x.device) - 1
    return -F.logsigmoid(labels * logits).sum() / len(x)


def checkpointed_clip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """CLIP's loss over chunks of rows, then of columns, each recomputed in the backward."""
    labels = torch.arange(len(x), device=x.device)

    def chunk(a: Tensor, b: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy((scale * a @ b.T).float(), labels, reduction="sum")

    total = torch.zeros((), device=x.device)
    for a, b in ((x, y), (y, x)):
        for some, own in zip(a.split(CHECKPOINT_ROWS), labels.split(CHECKPOINT_ROWS), strict=True):
            total = total + checkpoint(chunk, some, b, scale, own, use_reentrant=False)
    return total / (2 * len(x))


def checkpointed_siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss, one sum over all pairs, over chunks of rows that the backward recomputes."""

    def chunk(a: Tensor, y: Tensor, scale: Tensor, bias: Tensor, first: int) -> Tensor:
        logits = (scale * a @ y.T + bias).float()
        labels = torch.full_like(logits, -1)
        labels.diagonal(first).fill_(1)
        return -F.logsigmoid(labels * logits).sum()

    total = torch.zeros((), device=x.device)
    for first in range(0, len(x), CHECKPOINT_ROWS):
        some = x[first : first + CHECKPOINT_ROWS]
        total = total + checkpoint(chunk, some, y, scale, bias, first, use_reentrant=False)
    return total / len(x)


def dense_info_nce(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE of the rows alone."""
    logits = scale * x @ y.T
    return F.cross_entropy(logits, torch.arange(len(x), device=x.device))


def dense_clip_ids(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    """CLIP's loss without the pairs of different rows that have equal ids."""
    logits = scale * x @ y.T
    duplicates = (ids[:, None] == ids).fill_diagonal_(False)
    logits = logits.masked_fill(duplicates, -math.inf)
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def dense_supcon(x: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """The mean over the rows that have positives."""
    logits = scale * x @ x.T
    others = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    positives = (labels[:, None] == labels) & others
    total = logits.masked_fill(~others, -math.inf).logsumexp(1)
    number = positives.sum(1)
    each = total - (logits * positives).sum(1) / number.clamp_min(1)
    # An index by a mask would have a size that no compiler knows.
    return torch.where(number > 0, each, 0).sum() / (number > 0).sum()


def dense_ranking(x: Tensor, y: Tensor) -> Tensor:
    """The sum of the hinges of all negatives, both ways."""
    rows, columns = _hinges(x, y)
    return (rows.sum(1) + columns.sum(0)).mean()


def dense_ranking_hardest(x: Tensor, y: Tensor) -> Tensor:
    """The hinge of the hardest negative, both ways."""
    rows, columns = _hinges(x, y)
    return (rows.amax(1) + columns.amax(0)).mean()


def _hinges(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    t = x @ y.T
    off = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    rows = F.relu(MARGIN + t - t.diagonal()[:, None]) * off
    columns = F.relu(MARGIN + t - t.diagonal()) * off
    return rows, columns


def dense_nt_xent(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """SimCLR's loss of the 2N views, from their 2N x 2N logits."""
    views = torch.cat((x, y))
    logits = scale * views @ views.T
    logits.fill_diagonal_(-math.inf)
    labels = torch.arange(len(views), device=x.device).roll(len(x))
    return F.cross_entropy(logits, labels)


def dense_distill(
    x: Tensor, y: Tensor, scale: Tensor, teacher_x: Tensor, teacher_y: Tensor, teacher_scale: Tensor
) -> Tensor:
    """The cross-entropy with a teacher's softmax, both ways, from one matrix of each."""
    logits = scale * x @ y.T
    targets = teacher_scale * teacher_x @ teacher_y.T
    rows = -(targets.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    columns = -(targets.softmax(0) * logits.log_softmax(0)).sum(0).mean()
    return (rows + columns) / 2
