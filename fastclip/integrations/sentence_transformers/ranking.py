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
        distributed.contrast if o.across_ranks else contrast, normalize=o.normalize
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
    queries, positives, *negatives = columns
    both = "doc_to_query" in o.directions
    in_batch = o.hardness_mode in ("in_batch_negatives", "all_negatives") and o.hardness > 0
    if not in_batch:
        c = block(queries, positives, scale, columns=both)
        own, lines = c.positives, {"query_to_doc": [c.rows]}
        if both:
            lines["doc_to_query"] = [c.columns]
        penalty = o.hardness if o.hardness_mode == "hard_negatives" else 0
        for n in negatives:
            # With a penalty on the own hard negatives alone, they are the block's own pairs.
            c = block(queries, n, scale, offset=0 if penalty else None, columns=False)
            lines["query_to_doc"] += [c.rows]
            if penalty:
                lines["query_to_doc"] += [
                    c.positives + penalty * c.positives.detach() / scale.detach()
                ]
        return own, lines
    # Scores of negatives are (scale + hardness) * t, the second part without gradient: gradients
    # of features are those of scale * t.
    whole = scale + o.hardness
    q, p, *hard = (WeighedGradient.apply(side, scale / whole) for side in columns)

    def without_penalty(scores: Tensor) -> Tensor:
        return scores - o.hardness * scores.detach() / whole.detach()

    c = block(q, p, whole, columns=False)
    own, lines = without_penalty(c.positives), {"query_to_doc": [c.rows]}
    for n in hard:
        own_too = o.hardness_mode == "all_negatives"
        c = block(q, n, whole, offset=None if own_too else 0, columns=False)
        lines["query_to_doc"] += [c.rows] if own_too else [c.rows, without_penalty(c.positives)]
    if both:
        lines["doc_to_query"] = [block(queries, positives, scale, rows=False).columns]
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
