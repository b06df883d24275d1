"""NT-Xent, SimCLR's loss, fused and dense."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.dense import dense_logits, reduce_lines
from ..formulas.nt_xent import nt_xent
from ..formulas.reduction import Reduction
from .base import one_process


def nt_xent_loss(
    x1: Tensor,  # (N, D)
    x2: Tensor,  # (N, D)
    logit_scale: Tensor | float,
    *,
    decoupled: bool = False,
    weights: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """SimCLR's loss of two views of N samples, without its 2N x 2N matrix. Equivalent to:

        x = torch.cat((x1, x2))
        logits = logit_scale * x @ x.T
        logits.fill_diagonal_(-math.inf)
        loss = F.cross_entropy(logits, torch.arange(2 * N).roll(N))

    (Chen et al., arXiv 2002.05709). The block of x1 and x2 is computed once for both directions.

    Args:
        x1, x2: (N, D), the views; row i of both is a view of sample i.
        logit_scale: already exponentiated, 1 / temperature.
        decoupled: leaves the positive out of the log-sum-exp (DCL, arXiv 2110.06848).
        weights: (N), floating point: multiplies the samples' losses; the mean divides by its sum.
        normalize, backend: as in `clip_loss`.
        memory_budget: as in `clip_loss`, for the products of x1 and x2. On CPUs it is not used for
            N from 4096 to 16384, where keeping them was measured to be slower.
        reduction: "mean" over the 2N views, "sum" over samples, or "none" for (N,) losses; a
            sample's loss is the mean of its two views'.

    Returns, Raises: as `info_nce`.
    """
    world = one_process(normalize, backend, memory_budget)
    return nt_xent(world, x1, x2, logit_scale, decoupled, Reduction(reduction, weights))


def dense_nt_xent_loss(
    x1: Tensor,  # (N, D)
    x2: Tensor,  # (N, D)
    logit_scale: Tensor | float,
    *,
    decoupled: bool = False,
    weights: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """`nt_xent_loss` with its 2N x 2N matrix.

    Args: as `nt_xent_loss`; backend and memory_budget are ignored.
    """
    n = x1.shape[0]
    x = torch.cat((x1, x2))
    logits = dense_logits(x, x, logit_scale, None, normalize)
    logits = logits.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=x.device), -torch.inf)
    labels = torch.arange(2 * n, device=x.device).roll(n)
    if decoupled:
        negatives = logits.scatter(1, labels[:, None], -torch.inf)
        losses = negatives.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]
    else:
        losses = F.cross_entropy(logits, labels, reduction="none")
    return reduce_lines(losses.unflatten(0, (2, n)).mean(0), reduction, weights)
