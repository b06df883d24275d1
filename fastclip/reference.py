"""The losses, dense and obvious: what the fused engines compute, in the plainest PyTorch.

Each function builds the full N x N matrix of logits and lets autograd keep what it needs, so memory
grows with N^2. They are here to be read and to be compared with: same signatures as
`fastclip.loss`, any device, any floating dtype, differentiable as often as one likes. This file
imports nothing of fastclip but the kinds of statistic.

Letters: `x (N, D)` image features, `y (N, D)` text features, `s_ij = scale * <x_i, y_j> + bias`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .kinds import LN2, LOG2E, Kind, LineStatistics, kind_of

Reduction = Literal["none", "mean", "sum"]


def clip_loss(
    image_features: Tensor,  # (N, D)
    text_features: Tensor,  # (N, D)
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    normalize: bool = False,
    reduction: Reduction = "mean",
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """CLIP's symmetric softmax loss: each image picks its text from the batch, each text its image.

    Per pair, `loss_i = (CE(row i) + CE(column i)) / 2` with `CE(row i) = logsumexp_j(s_ij) - s_ii`
    and `CE(column i) = logsumexp_j(s_ji) - s_ii`. Equivalent to:

        logits = logit_scale * image_features @ text_features.T
        labels = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    Args:
        image_features, text_features: (N, D) each; row i of one belongs to row i of the other.
            Mixed dtypes promote as torch does; under autocast both are taken in the autocast dtype.
            Not normalised unless `normalize` says so.
        logit_scale: number, 0-dim or one-element tensor, already exponentiated.
        logit_bias: as `logit_scale`. It moves all logits alike and cancels: its gradient is exactly
            zero.
        normalize: divide every feature row by max(its norm, 1e-12) first.
        reduction: "mean" (open_clip's value), "sum", or "none" for the N per-pair losses.
        backend, memory_budget: ignored; here so that the signature is that of the fused loss.

    Returns:
        The loss, 0-dim or (N,) for "none"; float64 if either tower is float64, else float32.

    Raises:
        ValueError: for an unknown reduction.

    Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020.
    """
    logits = _logits(image_features, text_features, logit_scale, None, normalize)
    labels = torch.arange(logits.shape[0], device=logits.device)
    rows = F.cross_entropy(logits, labels, reduction="none")
    columns = F.cross_entropy(logits.T, labels, reduction="none")
    losses = (rows + columns) / 2
    if logit_bias is not None:
        # Inside the logits it would get the rounding error of a sum that cancels instead of a zero.
        losses = losses + 0 * _scalar(logit_bias, losses)
    return _reduce(losses, reduction)


def siglip_loss(
    image_features: Tensor,  # (N, D)
    text_features: Tensor,  # (N, D)
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    normalize: bool = False,
    reduction: Reduction = "mean",
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """SigLIP's sigmoid loss: every image-text combination is its own yes-or-no question.

    Per pair, `loss_i = softplus(-s_ii) + sum_{j!=i} (softplus(s_ij) + softplus(s_ji)) / 2`, so that
    the sum over pairs counts each of the N^2 combinations once. Equivalent to:

        logits = logit_scale * image_features @ text_features.T + logit_bias
        labels = 2 * torch.eye(len(logits)) - 1
        loss = -F.logsigmoid(labels * logits).sum() / len(logits)

    Args:
        image_features, text_features: (N, D) each, as for `clip_loss`.
        logit_scale: number, 0-dim or one-element tensor, already exponentiated.
        logit_bias: as `logit_scale`, or None for no bias. Here it has a real gradient.
        normalize, reduction, backend, memory_budget: as for `clip_loss`.

    Returns:
        The loss, 0-dim or (N,) for "none"; float64 if either tower is float64, else float32.

    Raises:
        ValueError: for an unknown reduction.

    Sigmoid Loss for Language Image Pre-Training, arXiv 2303.15343.
    """
    logits = _logits(image_features, text_features, logit_scale, logit_bias, normalize)
    labels = 2 * torch.eye(logits.shape[0], dtype=logits.dtype, device=logits.device) - 1
    pairs = -F.logsigmoid(labels * logits)
    # Half of row i and half of column i: the positive, in both, counts once.
    losses = (pairs.sum(dim=1) + pairs.sum(dim=0)) / 2
    return _reduce(losses, reduction)


def contrast(
    x: Tensor,  # (M, D)
    y: Tensor,  # (N, D)
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    offset: int | None = 0,
    ids: tuple[Tensor, Tensor] | None = None,
    same_id: str = "ignore",
    false_negative_margin: Tensor | float | None = None,
    key_bias: Tensor | None = None,
    rows: bool = True,
    columns: bool = True,
    kind: str = "softmax",
    normalize: bool = False,
    backend: str | None = None,
    memory_budget: int | None = None,
) -> LineStatistics:
    """`fastclip.contrast` with all of its matrices: logits, and masks of the pairs that count.

    Args, Returns, Raises: as there; backend and memory_budget are ignored. Logits are float32, or
    float64 if either side is. It has derivatives of any order.
    """
    logits = _logits(x, y, logit_scale, logit_bias, normalize)
    t = _logits(x.detach(), y.detach(), 1.0, None, normalize)
    if key_bias is not None:
        logits = logits + key_bias.to(logits.dtype)
    m, n = logits.shape
    i, j = torch.arange(m, device=x.device)[:, None], torch.arange(n, device=x.device)
    own = i + offset == j if offset is not None else torch.zeros_like(t, dtype=torch.bool)
    same = own if ids is None else (ids[0][:, None] == ids[1]) | own
    by_row = by_column = ~same
    if false_negative_margin is not None:
        similarity = torch.where(own, t, -torch.inf)
        for dim in (1, 0):
            # A line without an own positive has no limit.
            limit = similarity.amax(dim, keepdim=True)
            limit = torch.where(limit == -torch.inf, torch.inf, limit + false_negative_margin)
            if dim == 1:
                by_row = by_row & ~(t > limit)
            else:
                by_column = by_column & ~(t > limit)
    found = kind_of(kind)
    positives = torch.where(own, logits, 0).sum(1)
    positives = torch.where(own.any(1), positives, torch.nan).double()
    by_id: list[Tensor | None] = [None, None]
    if same_id == "positive":
        sign = -1 if found.negates_positives else 1
        by_id = [_statistic(found, sign * logits, same, dim) for dim in (1, 0)]
    return LineStatistics(
        _statistic(found, logits, by_row, 1) if rows else None,
        _statistic(found, logits, by_column, 0) if columns else None,
        positives,
        by_id[0] if rows else None,
        by_id[1] if columns else None,
    )


def _statistic(kind: type[Kind], logits: Tensor, counts: Tensor, dim: int) -> Tensor:
    """The statistic of the pairs that count in each line; float64."""
    logits = logits.double() * LOG2E
    if not kind.has_shift:
        return torch.where(counts, kind.fold(logits, torch.zeros_like(logits)), 0).sum(dim)
    logits = torch.where(counts, logits, -torch.inf)
    largest = logits.detach().amax(dim, keepdim=True)
    shift = torch.where(largest == -torch.inf, 0, largest)
    sums = kind.fold(logits, shift).sum(dim)
    # A line without pairs has -inf, and no gradient.
    some = sums > 0
    return torch.where(
        some, (torch.where(some, sums, 1).log2() + shift.squeeze(dim)) * LN2, -torch.inf
    )


def _logits(
    x: Tensor,  # (N, D)
    y: Tensor,  # (N, D)
    scale: Tensor | float,
    bias: Tensor | float | None,
    normalize: bool,
) -> Tensor:  # (N, N)
    """`scale * x @ y.T + bias` in float32, or float64 if either tower is: never in a half dtype."""
    x, y = _in_autocast_dtype(x), _in_autocast_dtype(y)
    dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.to(dtype), y.to(dtype)
        if normalize:
            x, y = F.normalize(x, dim=1, eps=1e-12), F.normalize(y, dim=1, eps=1e-12)
        logits = _scalar(scale, x) * (x @ y.T)
        return logits if bias is None else logits + _scalar(bias, x)


def _in_autocast_dtype(x: Tensor) -> Tensor:
    """`x` as the matmul that the loss replaces would take it; autocast leaves float64 alone."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def _scalar(value: Tensor | float, like: Tensor) -> Tensor | float:
    """A one-element tensor as 0-dim in `like`'s dtype: its own shape and dtype must not spread."""
    return value.to(like).reshape(()) if isinstance(value, Tensor) else value


def _reduce(losses: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "mean":
        return losses.mean()
    if reduction == "sum":
        return losses.sum()
    raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
