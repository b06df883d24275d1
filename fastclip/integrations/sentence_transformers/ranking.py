"""The ranking loss: queries, their documents and hard negatives, in up to four directions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import distributed
from ...contrast import contrast
from ...engine.autograd import WeighedGradient
from ...engine.dtypes import product_dtype, state_dtype
from ...kinds import LineStatistics

Block = Callable[..., LineStatistics]


class Ranking(NamedTuple):
    """The options of `MultipleNegativesRankingLoss`.

    normalize: cosine similarities, else dot products. hardness: 0 without a `hardness_mode`.
    across_ranks: the negatives are those of all ranks.
    """

    scale: Tensor | float
    normalize: bool
    directions: tuple[str, ...]
    partition_mode: str
    hardness_mode: str | None
    hardness: float
    across_ranks: bool


def ranking_loss(columns: Sequence[Tensor], o: Ranking) -> Tensor:
    """Returns the loss of queries, positives and hard negatives, each (N, D).

    The scores of query i, with the cosine or the dot product as similarity:

        query_to_doc    scale * similarity(query i, every document)
        query_to_query  scale * similarity(query i, every other query)
        doc_to_query    scale * similarity(positive i, every query)
        doc_to_doc      scale * similarity(positive i, every document of the other queries)

    Its loss is their log-sum-exp minus the positive's score: of all directions' scores together,
    or the mean over directions. Hardness adds `hardness * similarity`, without a gradient, to the
    scores of query_to_doc that the mode names. Nothing of size N x N is kept.
    """
    queries, positives, *negatives = columns
    scale = torch.as_tensor(o.scale, dtype=state_dtype(queries.device), device=queries.device)
    block = functools.partial(
        distributed.contrast if o.across_ranks else contrast, normalize=o.normalize, memory_budget=0
    )
    own, lines = _to_documents(block, columns, scale, o)
    if "query_to_query" in o.directions:
        lines["query_to_query"] = [block(queries, None, scale).rows]
    if "doc_to_doc" in o.directions:
        # The own hard negatives of a positive's query are the block's own pairs.
        lines["doc_to_doc"] = [block(positives, None, scale).rows]
        lines["doc_to_doc"] += [block(positives, n, scale, columns=False).rows for n in negatives]
    if o.partition_mode == "per_direction":
        losses = [cross_entropy(parts, own) for parts in lines.values()]
        loss = sum(losses) / len(losses)
    else:
        parts = [part for found in lines.values() for part in found]
        # The positive is a score of both directions.
        parts += [own] if "doc_to_query" in o.directions else []
        loss = cross_entropy(parts, own)
    return loss.to(loss_dtype(*columns))


def _to_documents(
    block: Block, columns: Sequence[Tensor], scale: Tensor, o: Ranking
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """The positives' scores, and the log-sum-exps of query_to_doc and doc_to_query, block by block
    and without the positives."""
    both, count = "doc_to_query" in o.directions, len(columns[0])
    on_others = o.hardness if o.hardness_mode in ("in_batch_negatives", "all_negatives") else 0
    on_own = o.hardness if o.hardness_mode in ("hard_negatives", "all_negatives") else 0
    queries, *documents = columns
    if on_own == on_others:
        documents = [torch.cat(documents)]
    whole = scale + on_others
    if on_others:
        # Scores of negatives are (scale + hardness) * t, the second part without gradient:
        # gradients of features are those of scale * t.
        queries, *documents = (
            WeighedGradient.apply(side, scale / whole) for side in (queries, *documents)
        )

    def shifted(scores: Tensor, hardness: float) -> Tensor:
        return scores + hardness * scores.detach() / whole.detach() if hardness else scores

    first, *negatives = documents
    c = block(queries, first, whole, columns=both and not on_others)
    own, lines = shifted(c.positives, -on_others), {"query_to_doc": [c.rows]}
    if both:
        c = c if not on_others else block(*columns[:2], scale, rows=False)
        lines["doc_to_query"] = [c.columns[:count]]
    for n in negatives:
        # The own hard negatives are the block's own pairs.
        c = block(queries, n, whole, columns=False)
        lines["query_to_doc"] += [c.rows, shifted(c.positives, on_own - on_others)]
    return own, lines


def cross_entropy(parts: Sequence[Tensor], own: Tensor) -> Tensor:
    """The mean of `log(exp(own) + sum of exp(part)) - own` over lines. The positives (N) stay apart
    from the other scores' log-sum-exps (N): nothing cancels when they are far above these."""
    # -inf stands for no scores; logaddexp of two of them would have NaN for a gradient.
    lowest = torch.finfo(own.dtype).min / 4
    others = functools.reduce(torch.logaddexp, [part.clamp_min(lowest) for part in parts])
    return F.softplus(others - own, threshold=60).mean()


def loss_dtype(*embeddings: Tensor) -> torch.dtype:
    """float64 for float64 embeddings, else float32."""
    return torch.promote_types(product_dtype(*embeddings), torch.float32)
