"""SigLIP's loss, fused and dense."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.dense import dense_logits, reduce_lines
from ..formulas.info_nce import pair_of
from ..formulas.needs_lines import check_no_live, needs_lines
from ..formulas.reduction import Reduction
from ..formulas.siglip import siglip
from .base import one_process, paired_loss


def siglip_loss(
    image_features: Tensor,  # (N, D)
    text_features: Tensor,  # (N, D)
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    ids: tuple[Tensor, Tensor] | Tensor | None = None,
    same_id: str = "ignore",
    weights: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
    memory_budget: int | None = None,
    live: tuple[int, int] | None = None,
) -> Tensor:
    """SigLIP's pairwise sigmoid loss without its N x N matrix. Equivalent to:

        logits = logit_scale * image_features @ text_features.T + logit_bias
        labels = 2 * torch.eye(len(logits)) - 1
        loss = -F.logsigmoid(labels * logits).sum() / len(logits)

    (Zhai et al., arXiv 2303.15343). Per pair, `reduction="none"` gives the positive's term plus
    half of the row's and half of the column's negatives.

    With `same_id="positive"` every pair with equal ids has the label 1; the sum over all pairs is
    divided by N as without ids.

    Args, Returns, Raises: as `clip_loss`; here `logit_bias` has a gradient. For a scalar reduction
    the forward makes the gradients, too, which saves a quarter of the work, and keeps them in
    float32 for the backward: on CPUs, for half features, only within `memory_budget`.
    """
    if needs_lines(ids, 0, weights, same_id):
        check_no_live(live)
        world = one_process(normalize, backend, memory_budget)
        return siglip(
            world, image_features, text_features, logit_scale, logit_bias, ids, same_id,
            Reduction(reduction, weights),
        )  # fmt: skip
    return paired_loss(
        "sigmoid", dense_siglip_loss, image_features, text_features, logit_scale, logit_bias,
        normalize, reduction, backend, memory_budget, live,
    )  # fmt: skip


def dense_siglip_loss(
    image_features: Tensor,  # (N, D)
    text_features: Tensor,  # (N, D)
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    ids: tuple[Tensor, Tensor] | Tensor | None = None,
    same_id: str = "ignore",
    weights: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """`siglip_loss` with its N x N matrix: each combination of image and text is a yes-or-no
    question of its own.

    Per pair, `loss_i = softplus(-s_ii) + sum_{j!=i} (softplus(s_ij) + softplus(s_ji)) / 2`, so that
    the sum over pairs counts each of the N^2 combinations once.

    Args: as `siglip_loss`; backend and memory_budget are ignored.

    Returns:
        The loss, 0-dim, or (N,) for "none"; float64 if either tower is float64, else float32.

    Raises:
        ValueError: an unknown reduction.
    """
    logits = dense_logits(image_features, text_features, logit_scale, logit_bias, normalize)
    own = torch.eye(logits.shape[0], dtype=torch.bool, device=logits.device)
    same = own
    if ids is not None:
        x_ids, y_ids = pair_of(ids)
        same = own | (x_ids[:, None] == y_ids)
    positives = same if same_id == "positive" else own
    labels = 2 * positives.to(logits.dtype) - 1
    pairs = -F.logsigmoid(labels * logits)
    if same_id == "ignore":
        pairs = torch.where(same & ~own, 0, pairs)
    # Half of row i and half of column i: the positive is in both, so it counts once.
    losses = (pairs.sum(dim=1) + pairs.sum(dim=0)) / 2
    return reduce_lines(losses, reduction, weights)
