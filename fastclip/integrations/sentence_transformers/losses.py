"""The classes: sentence-transformers', with the losses of embeddings computed by fastclip.

This module imports sentence-transformers; its package imports this module when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer.losses import (
    CachedGISTEmbedLoss as TheirCachedGIST,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss as TheirCachedRanking,
)
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss as TheirGIST
from sentence_transformers.sentence_transformer.losses import (
    MultipleNegativesRankingLoss as TheirRanking,
)
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn

from ..plain import is_plain
from .calls import gathers_alike, normalizes, obstacle_of, served
from .guided import Guided, guided_loss
from .ranking import Ranking, ranking_loss

ANOTHER_GATHER = "the host's gather_across_devices is replaced"


def _ranking_of(loss: Any, embeddings: Sequence[Tensor], host: type) -> Ranking | None:
    """The options of a ranking loss; None if the host's own code must serve the call."""
    normalize = normalizes(loss.similarity_fct)
    obstacle = obstacle_of([embeddings])
    if normalize is None:
        obstacle = "similarity_fct is neither cos_sim nor dot_score"
    if loss.gather_across_devices and not gathers_alike(host):
        obstacle = ANOTHER_GATHER
    if len(embeddings) < 2 or not served(obstacle):
        return None
    hardness = 0.0 if loss.hardness_mode is None else loss.hardness_strength
    return Ranking(
        loss.scale, normalize, loss.directions, loss.partition_mode, loss.hardness_mode, hardness,
        loss.gather_across_devices,
    )  # fmt: skip


class MultipleNegativesRankingLoss(TheirRanking):
    """sentence-transformers' class without its N x N matrices: same arguments, value, gradients.

    N queries and K columns of documents of D features take memory O(K N D) in place of
    O(K N^2). With `gather_across_devices` the gradients, after DDP's mean over ranks, are those
    of one process on the whole batch.

    The host's own code computes the loss, with one warning, if similarity_fct is neither
    `cos_sim`, `dot_score` nor the `similarity` of a model that has one of them, or if embeddings
    are sparse; without a warning with FASTCLIP_DISABLE=1.
    """

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        """The loss of queries, positives and hard negatives, each (N, D). labels are not used.

        Raises:
            ValueError: fewer than two columns.
        """
        options = _ranking_of(self, embeddings, TheirRanking)
        if options is None:
            return super().compute_loss_from_embeddings(embeddings, labels)
        return ranking_loss(embeddings, options)


class CachedMultipleNegativesRankingLoss(TheirCachedRanking):
    """sentence-transformers' class with the loss of the whole batch in one call, in place of one
    for each `mini_batch_size` rows: same arguments, value, gradients.

    Memory, ranks and fallbacks are those of `MultipleNegativesRankingLoss`. `show_progress_bar`
    shows the mini-batches of the model alone.
    """

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of the embeddings of each column's mini-batches. with_backward: also
        accumulates their gradients, and returns the loss without its graph."""
        embeddings = [torch.cat(column) for column in reps]
        options = _ranking_of(self, embeddings, TheirCachedRanking)
        if options is None:
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        return _backward_if(with_backward, ranking_loss(embeddings, options))


def _guided_of(
    loss: Any, columns: Sequence[Tensor], guides: Sequence[Tensor], host: type
) -> Guided | None:
    """The options of a GIST loss; None if the host's own code must serve the call."""
    obstacle = obstacle_of([columns, guides])
    if loss.margin < 0:
        # Their self-similarities then pass the margin, and a feature is its own negative.
        obstacle = "the margin is negative"
    if not is_plain(loss.similarity_fct, nn.CosineSimilarity(dim=-1)) or (
        type(loss).sim_matrix is not host.sim_matrix
    ):
        obstacle = "the similarity of a GIST loss is not its own"
    if not is_plain(loss.cross_entropy_loss, nn.CrossEntropyLoss()):
        obstacle = "the cross-entropy of a GIST loss is not its own"
    if loss.gather_across_devices and not gathers_alike(host):
        obstacle = ANOTHER_GATHER
    if not served(obstacle):
        return None
    return Guided(
        loss.temperature, loss.margin, loss.margin_strategy, loss.contrast_anchors,
        loss.contrast_positives, loss.gather_across_devices,
    )  # fmt: skip


class CachedGISTEmbedLoss(TheirCachedGIST):
    """sentence-transformers' class with the loss of the whole batch in one call, in place of one
    for each `mini_batch_size` rows: same arguments, value, gradients.

    N anchors and K further columns of D features, D' of the guide, take memory O(K N (D + D')) in
    place of O(K mini_batch_size N D). A text is never its own negative; the host keeps it if the
    guide's similarity of its pair is 1. The host's own code computes the loss, with one warning, if
    the margin is negative, or the similarity or the cross-entropy is replaced.
    """

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *,
        with_backward: bool = False,
    ) -> Tensor:  # fmt: skip
        """The loss of the embeddings of each column's mini-batches. with_backward: also
        accumulates their gradients, and returns the loss without its graph.

        Raises:
            ValueError: columns without the guide's embeddings, or the reverse.
        """
        columns, guides = ([torch.cat(c) for c in of] for of in (reps, reps_guided))
        same = len(columns) == len(guides)
        options = _guided_of(self, columns, guides, TheirCachedGIST) if same else None
        if options is None:
            return super().calculate_loss(reps, reps_guided, with_backward=with_backward)
        return _backward_if(with_backward, guided_loss(columns, guides, options))


class GISTEmbedLoss(TheirGIST):
    """sentence-transformers' class without its N x N x D products: same arguments, value,
    gradients. Memory and fallbacks are those of `CachedGISTEmbedLoss`."""

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss of the texts of anchors, positives and perhaps negatives. labels are not used.

        Raises:
            ValueError: neither two nor three columns.
        """
        features = list(sentence_features)
        if not 2 <= len(features) <= 3 or _guided_of(self, (), (), TheirGIST) is None:
            return super().forward(features, labels)
        for_guide = [dict(column) for column in features]  # a model writes into what it gets
        columns = embed_columns(self.model, features)
        with torch.no_grad():
            if self.must_retokenize:
                for_guide = [self._for_guide(column) for column in features]
            guides = embed_columns(self.guide, for_guide)
        options = _guided_of(self, columns, guides, TheirGIST)
        if options is None:
            return super().forward(features, labels)
        return guided_loss(columns, guides, options)

    def _for_guide(self, column: dict[str, Any]) -> dict[str, Any]:
        """The guide's features of a column's texts, which are read back from their tokens."""
        tokens = column["input_ids"]
        if "cu_seq_lens_q" in column:  # all texts in one row, for flash attention
            lengths = column["cu_seq_lens_q"].diff().tolist()
            tokens = [part.tolist() for part in tokens[0].split(lengths)]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return batch_to_device(self.guide.preprocess(texts), self.guide.device)


def _backward_if(wanted: bool, loss: Tensor) -> Tensor:
    if not wanted:
        return loss
    loss.backward()
    return loss.detach()
