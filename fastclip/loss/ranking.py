"""The ranking loss of pairs, a sum or a maximum of hinges, fused and dense."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.dense import dense_logits, reduce_lines
from ..formulas.info_nce import pair_of
from ..formulas.ranking import check_ranking, ranking
from ..formulas.reduction import Reduction
from .base import one_process


def ranking_loss(
    x: Tensor,  # (N, D)
    y: Tensor,  # (N, D)
    *,
    margin: float = 0.2,
    hardest: bool = False,
    symmetric: bool = True,
    ids: tuple[Tensor, Tensor] | Tensor | None = None,
    weights: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """The hinge loss of pairs, without their N x N matrix. Equivalent to:

        t = x @ y.T
        off = ~torch.eye(N, dtype=torch.bool)
        rows = F.relu(margin + t - t.diagonal()[:, None]) * off
        columns = F.relu(margin + t - t.diagonal()) * off
        loss = (rows.sum(1) + columns.sum(0)).mean()    # hardest=True: amax in place of sum

    (VSE++: Faghri et al., arXiv 1707.05612. With `symmetric=False` and frozen word vectors y it is
    DeViSE's: Frome et al., NeurIPS 2013.) There is no logit scale.

    Args:
        x, y: (N, D), row i of both is a pair.
        margin: >= 0, in units of the similarity.
        hardest: True takes the largest similarity of each line in place of the sum; only that pair
            and the line's own have a gradient. The first one of equal similarities is taken.
        symmetric: True adds the columns' hinges to the rows'.
        ids: (x ids (N), y ids (N)), integers, or one tensor (N) for both: pairs with equal ids are
            no negatives.
        weights: (N), floating point: multiplies the pairs' losses; the mean divides by its sum.
        normalize, reduction: as in `clip_loss`.
        backend, memory_budget: as in `clip_loss`. With `hardest`, every engine's search is plain
            PyTorch, in chunks.

    Returns, Raises: as `info_nce`.
    """
    world = one_process(normalize, backend, memory_budget)
    how = Reduction(reduction, weights)
    if backend == "reference":
        check_ranking(world, x, y, margin, pair_of(ids), how)
        return dense_ranking_loss(
            x, y, margin=margin, hardest=hardest, symmetric=symmetric, ids=ids, weights=weights,
            normalize=normalize, reduction=reduction,
        )  # fmt: skip
    return ranking(world, x, y, margin, hardest, symmetric, ids, normalize, how)


def dense_ranking_loss(
    x: Tensor,  # (N, D)
    y: Tensor,  # (N, D)
    *,
    margin: float = 0.2,
    hardest: bool = False,
    symmetric: bool = True,
    ids: tuple[Tensor, Tensor] | Tensor | None = None,
    weights: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """`ranking_loss` with its N x N matrix.

    Args: as `ranking_loss`; backend and memory_budget are ignored.
    """
    t = dense_logits(x, y, 1.0, None, normalize)
    negatives = ~torch.eye(t.shape[0], dtype=torch.bool, device=t.device)
    if ids is not None:
        x_ids, y_ids = pair_of(ids)
        negatives = negatives & (x_ids[:, None] != y_ids)
    own, losses = t.diagonal(), 0
    for dim in (1, 0) if symmetric else (1,):
        if hardest:
            largest = t.masked_fill(~negatives, -torch.inf).max(dim).values
            losses = losses + F.relu(margin + largest - own)
        else:
            hinges = F.relu(margin + t - own.unsqueeze(dim))
            losses = losses + torch.where(negatives, hinges, 0).sum(dim)
    return reduce_lines(losses, reduction, weights)
