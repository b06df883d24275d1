"""The GIST loss: a guide leaves out negatives that it finds closer than the positive."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import distributed
from ...contrast import contrast
from .ranking import cross_entropy, loss_dtype


class Guided(NamedTuple):
    """The options of `GISTEmbedLoss`. across_ranks: positives and negatives are those of all
    ranks; anchors are contrasted with this rank's anchors alone, as the host does."""

    temperature: Tensor | float
    margin: float
    margin_strategy: str
    contrast_anchors: bool
    contrast_positives: bool
    across_ranks: bool


def guided_loss(columns: Sequence[Tensor], guides: Sequence[Tensor], o: Guided) -> Tensor:
    """Returns the loss of anchors, positives and negatives, each (N, D).

    guides: the guide's embeddings of the same texts, each (N, D'), without a gradient. Its
    similarity of anchor i and positive i, less the margin, is the limit of line i: pairs that the
    guide finds closer are left out. Nothing of size N x N is kept.
    """
    (anchors, positives, *negatives), (ga, gp, *of_negatives) = columns, guides
    # Similarities are elementwise sums, which autocast leaves in the embeddings' dtype.
    with torch.autocast(anchors.device.type, enabled=False):
        wide = torch.promote_types(torch.promote_types(ga.dtype, gp.dtype), torch.float32)
        own = F.cosine_similarity(ga.to(wide), gp.to(wide))
        by_pair = o.margin_strategy == "relative" and o.margin != 0
        # Texts that occur twice make similarities equal, and the host keeps such pairs. A block's
        # similarities are products of matrices, rounded otherwise than `own`.
        same = 16 * torch.finfo(wide).eps
        limits = (own - o.margin * own.abs() if by_pair else own - o.margin) + same
        within = functools.partial(
            contrast, logit_scale=1 / o.temperature, columns=False, normalize=True, memory_budget=0
        )
        across = functools.partial(distributed.contrast, **within.keywords)
        block = across if o.across_ranks else within
        # The margin compares with the own pair of the block itself: a positive that occurs twice
        # stays, as it does where both similarities are computed alike.
        limit = {"limits": limits} if by_pair else {"false_negative_margin": -o.margin}
        c = block(anchors, positives, guide=(ga, gp), **limit)
        parts = [c.rows]
        if o.contrast_anchors:
            parts += [within(anchors, None, guide=ga, limits=limits).rows]
        if o.contrast_positives:
            parts += [block(positives, None, guide=gp, limits=limits).rows]
        for n, gn in zip(negatives, of_negatives, strict=True):
            parts += [block(anchors, n, guide=(ga, gn), limits=limits, offset=None).rows]
        return cross_entropy(parts, c.positives).to(loss_dtype(*columns))
