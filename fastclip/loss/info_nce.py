"""InfoNCE, fused and dense: rows against keys, one way or both, with the field's variants."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine.beside import Given
from ..engine.contrast_checks import check_contrast
from ..engine.dense import as_scalar, dense_logits, reduce_lines
from ..formulas.info_nce import InfoNCE, check_info_nce
from ..formulas.info_nce import info_nce as formula
from ..formulas.reduction import Reduction
from .base import one_process


def info_nce(
    queries: Tensor,  # (M, D)
    keys: Tensor,  # (N, D)
    logit_scale: Tensor | float,
    *,
    offset: int | None = 0,
    labels: Tensor | None = None,
    ids: tuple[Tensor, Tensor] | None = None,
    same_id: str = "ignore",
    false_negative_margin: Tensor | float | None = None,
    key_bias: Tensor | None = None,
    margin: float = 0,
    label_smoothing: float = 0,
    decoupled: bool = False,
    hardness: float = 0,
    weights: Tensor | None = None,
    symmetric: bool = False,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """The cross-entropy of each query's own key among all keys, without the (M, N) matrix.
    Equivalent to:

        logits = logit_scale * queries @ keys.T + key_bias
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)

    (van den Oord et al., arXiv 1807.03748). Keys may be more than queries: hard negatives, or a
    queue (He et al., arXiv 1911.05722).

    Args:
        queries, keys: (M, D), (N, D), float64, float32, bfloat16 or float16, as in `clip_loss`.
        logit_scale: already exponentiated, 1 / temperature; a number or a tensor of one element.
        offset: query i has its own key in row i + offset. None, with `same_id="positive"` only: ids
            alone name the positives.
        labels: (M), integers: the row of each query's own key, in place of offset.
        ids: (query ids (M), key ids (N)), integers: pairs with equal ids are no negatives.
        same_id: "ignore" leaves these pairs out. "positive" makes them positives: the loss of a
            query is the mean over its positives of log-sum-exp minus their logit (SupCon's "out"
            form, arXiv 2004.11362; UniCL, arXiv 2204.03610). Queries without positives then count
            neither in the sum nor in the mean.
        false_negative_margin: leaves out keys whose similarity exceeds the own key's by more.
        key_bias: (N), added to the logits of each key, with a gradient: -log q for keys that are
            sampled with probability q; -inf takes a key out.
        margin: in units of the similarity: logits of positives become
            `logit_scale * (<query, key> - margin)` (CosFace, arXiv 1801.09414).
        label_smoothing: as in `F.cross_entropy`, over the keys that are not left out.
        decoupled: leaves positives out of the log-sum-exp (DCL, arXiv 2110.06848).
        hardness: logits of negatives become `logit_scale * t + hardness * t.detach()`, with the
            similarity t (sentence-transformers' `hardness_mode="all_negatives"`).
        weights: (M), floating point: multiplies the queries' losses; the mean divides by its sum.
        symmetric: True takes the mean of the queries' losses and of their keys' losses over all
            queries.
        normalize, backend, memory_budget: as in `clip_loss`.
        reduction: "mean", "sum", or "none" for (M,) losses.

    Returns:
        The loss in float32 (float64 for float64 features). Gradients are exact, with respect to
        queries, keys, logit_scale, key_bias and weights; they have no second derivative.

    Raises:
        TypeError, ValueError: as `fastclip.contrast`; a query without a key; options that exclude
            each other: symmetric and labels or `offset=None`; label_smoothing and margin, hardness
            or false_negative_margin; hardness and `same_id="positive"`.
        RuntimeError: as `clip_loss`.
    """
    options = InfoNCE(
        offset, labels, ids, same_id, false_negative_margin, key_bias, margin, label_smoothing,
        decoupled, hardness, symmetric,
    )  # fmt: skip
    world, how = one_process(normalize, backend, memory_budget), Reduction(reduction, weights)
    if backend == "reference":
        # The formula's first derivatives are exact, but with hardness its second ones are not.
        check_info_nce(world, queries, keys, logit_scale, options, how)
        check_contrast(
            queries, keys, logit_scale, None, key_bias, Given(ids, false_negative_margin, labels),
            offset=offset, same_id=same_id, rows=True, columns=symmetric, kind="softmax",
        )  # fmt: skip
        world.check_engine(queries, keys)
        return dense_info_nce(
            queries, keys, logit_scale, **options._asdict(), weights=weights, normalize=normalize,
            reduction=reduction,
        )  # fmt: skip
    return formula(world, queries, keys, logit_scale, options, how)


def dense_info_nce(
    queries: Tensor,  # (M, D)
    keys: Tensor,  # (N, D)
    logit_scale: Tensor | float,
    *,
    offset: int | None = 0,
    labels: Tensor | None = None,
    ids: tuple[Tensor, Tensor] | None = None,
    same_id: str = "ignore",
    false_negative_margin: Tensor | float | None = None,
    key_bias: Tensor | None = None,
    margin: float = 0,
    label_smoothing: float = 0,
    decoupled: bool = False,
    hardness: float = 0,
    weights: Tensor | None = None,
    symmetric: bool = False,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """`info_nce` with its (M, N) matrix.

    A query's loss is the cross-entropy of the target distribution: `1 - label_smoothing` evenly on
    its positives, and `label_smoothing` evenly on all keys that are not left out.

    Args: as `info_nce`; backend and memory_budget are ignored.
    """
    logits = dense_logits(queries, keys, logit_scale, None, normalize)
    t = dense_logits(queries.detach(), keys.detach(), 1.0, None, normalize)
    m, n = logits.shape
    i, j = torch.arange(m, device=t.device)[:, None], torch.arange(n, device=t.device)
    own = torch.zeros_like(t, dtype=torch.bool)
    if labels is not None:
        own = labels[:, None] == j
    elif offset is not None:
        own = i + offset == j
    same = own if ids is None else own | (ids[0][:, None] == ids[1])
    positives = same if same_id == "positive" else own
    left_out = same & ~positives
    if key_bias is not None:
        logits = logits + key_bias.to(logits.dtype)
        if same_id == "positive":
            positives = positives & (key_bias != -torch.inf)
    if hardness:
        logits = logits + torch.where(positives, 0, hardness * t)
    logits = logits - torch.where(positives, margin * as_scalar(logit_scale, t), 0)
    limit = torch.where(own, t, -torch.inf)
    losses, counts = [], None
    for dim in (1, 0) if symmetric else (1,):
        out = left_out
        if false_negative_margin is not None:
            most = limit.amax(dim, keepdim=True)
            # A line without an own key keeps all keys.
            most = torch.where(most == -torch.inf, torch.inf, most + false_negative_margin)
            out = out | ((t > most) & ~positives)
        of_lines, found = _cross_entropy(logits, positives, out, dim, label_smoothing, decoupled)
        pairs = slice(0, m) if dim == 1 else slice(offset, offset + m)
        losses.append(of_lines[pairs])
        counts = found if counts is None else counts  # rows come first
    return reduce_lines(sum(losses) / len(losses), reduction, weights, counts)


def _cross_entropy(
    logits: Tensor, positives: Tensor, left_out: Tensor, dim: int, label_smoothing: float,
    decoupled: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The losses of lines, and which have positives; the losses of others are 0."""
    candidates = ~left_out & (logits != -torch.inf)
    counted = candidates & ~positives if decoupled else candidates
    total = logits.masked_fill(~counted, -torch.inf).logsumexp(dim)
    number = positives.sum(dim, keepdim=True)
    target = positives.to(logits.dtype) * (1 - label_smoothing) / number.clamp_min(1)
    if label_smoothing:
        evenly = label_smoothing / candidates.sum(dim, keepdim=True).to(logits.dtype).clamp_min(1)
        target = target + candidates * evenly
    losses = total - torch.where(target > 0, target * logits, 0).sum(dim)
    has_positives = number.squeeze(dim) > 0
    return torch.where(has_positives, losses, 0), has_positives
