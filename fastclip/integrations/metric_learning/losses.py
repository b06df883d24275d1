"""The classes. This module imports pytorch-metric-learning; its package imports this module when it
is needed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
from pytorch_metric_learning.losses import NTXentLoss as TheirNTXent
from pytorch_metric_learning.losses import SupConLoss as TheirSupCon
from torch import Tensor

from ...contrast import contrast
from ...loss.info_nce import info_nce
from ...loss.supcon import supcon_loss
from ..host import disabled
from .host import HOST
from .pairs import Pairs

# An NT-Xent loss has a term for each positive pair, whose similarities are computed one by one.
MOST_POSITIVES = 8

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _pairs(loss: Any, given: tuple[Any, ...], host: type, most: float = torch.inf) -> Pairs | None:
    """The pairs of a call of `compute_loss`; None if the host's own code must serve it."""
    embeddings, labels, indices_tuple, ref_emb, ref_labels = given
    if disabled() or labels is None or not len(embeddings):
        return None
    distance, obstacle = loss.distance, None
    if indices_tuple is not None:
        obstacle = "pairs are named by indices_tuple"
    elif type(distance) not in (CosineSimilarity, DotProductSimilarity) or distance.power != 1:
        obstacle = "the distance is neither CosineSimilarity nor DotProductSimilarity"
    elif distance.normalize_embeddings and distance.p != 2:
        obstacle = "embeddings are divided by another norm"
    elif distance.collect_stats:
        obstacle = "statistics of distances are collected"
    elif ref_labels is None or (ref_emb is embeddings) != (ref_labels is labels):
        obstacle = "ref_emb has no labels of its own"
    elif any(t.ndim != 1 or t.dtype not in INTEGERS for t in (labels, ref_labels)):
        obstacle = "labels are not integers, one for each embedding"
    elif type(loss)._compute_loss is not host._compute_loss:
        obstacle = "a subclass computes the loss of similarities"
    else:
        pairs = Pairs.of(labels, None if ref_emb is embeddings else ref_labels)
        if pairs.positives <= most * len(labels):
            return pairs
        obstacle = f"there are more than {most} positives for each embedding"
    HOST.falls_back(obstacle)
    return None


class SupConLoss(TheirSupCon):
    """pytorch-metric-learning's class without its M x N matrices: memory O((M + N) D) in place of
    O(M N). Same arguments, reducers, value and gradients.

    A line's loss is computed in float32 at least. The default reducer leaves out lines whose loss
    is 0, and the two classes round small losses to 0 at different sizes. The host's own code
    serves calls with indices_tuple, other distances, other norms and floating-point labels, with
    one warning; without a warning with FASTCLIP_DISABLE=1.
    """

    def compute_loss(self, *given: Any) -> dict[str, Any]:
        """The losses of lines, for the reducer; given: embeddings (M, D), labels (M),
        indices_tuple, ref_emb (N, D), ref_labels (N)."""
        pairs = _pairs(self, given, TheirSupCon)
        if pairs is None:
            return super().compute_loss(*given)
        if pairs.are_missing:
            return self.zero_losses()
        embeddings, labels, _, ref_emb, ref_labels = given
        how = {"normalize": self.distance.normalize_embeddings, "reduction": "none"}
        how |= {"logit_scale": 1 / self.temperature, "memory_budget": 0}
        if pairs.one_set:
            losses = supcon_loss(embeddings, labels, **how)
        else:
            how |= {"offset": None, "ids": (labels, ref_labels), "same_id": "positive"}
            losses = info_nce(embeddings, ref_emb, **how)
        indices = torch.arange(len(embeddings), device=embeddings.device)
        return _to_reducer(losses, indices, "element", embeddings)


class NTXentLoss(TheirNTXent):
    """pytorch-metric-learning's class without its matrices: memory O((M + N + P) D) for P positive
    pairs, in place of P times the number of negative pairs. Same arguments, reducers, value and
    gradients. Fallbacks are those of `SupConLoss`, and more than 8 positives for each
    embedding."""

    def compute_loss(self, *given: Any) -> dict[str, Any]:
        """The losses of positive pairs, for the reducer; given as for `SupConLoss`."""
        pairs = _pairs(self, given, TheirNTXent, MOST_POSITIVES)
        if pairs is None:
            return super().compute_loss(*given)
        if pairs.are_missing:
            return self.zero_losses()
        x, labels, _, y, ref_labels = given
        if self.distance.normalize_embeddings:
            x, y = F.normalize(x), F.normalize(y)
        scale, how = 1 / self.temperature, {"columns": False, "memory_budget": 0}
        anchors, positives = pairs.indices()
        if pairs.one_set:
            rows = contrast(x, None, scale, ids=labels, **how).rows
        else:
            rows = contrast(x, y, scale, offset=None, ids=(labels, ref_labels), **how).rows
        logits = scale * (x[anchors] * y[positives]).sum(1, dtype=rows.dtype)
        losses = F.softplus(rows[anchors] - logits, threshold=60)
        return _to_reducer(losses, (anchors, positives), "pos_pair", x)


def _to_reducer(losses: Tensor, indices: Any, kind: str, embeddings: Tensor) -> dict[str, Any]:
    """The arguments of the host's reducers, which need losses in the embeddings' dtype."""
    losses = losses.to(embeddings.dtype)
    return {"loss": {"losses": losses, "indices": indices, "reduction_type": kind}}
