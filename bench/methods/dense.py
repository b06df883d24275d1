"""The losses in plain PyTorch, as one writes them without a library.

Inputs are x (M, D) and y (N, D), N >= M; the positive of row i is column i.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHECKPOINT_ROWS = 1024


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
