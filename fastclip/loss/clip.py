"""CLIP's loss, fused and dense."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.dense import as_scalar, dense_logits, reduce_lines
from ..formulas.info_nce import InfoNCE, clip, pair_of
from ..formulas.needs_lines import check_no_live, needs_lines
from ..formulas.reduction import Reduction
from .base import one_process, paired_loss
from .info_nce import dense_info_nce


def clip_loss(
    image_features: Tensor,  # (N, D)
    text_features: Tensor,  # (N, D)
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    ids: tuple[Tensor, Tensor] | Tensor | None = None,
    same_id: str = "ignore",
    label_smoothing: float = 0,
    weights: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
    memory_budget: int | None = None,
    live: tuple[int, int] | None = None,
) -> Tensor:
    """CLIP's symmetric softmax loss without its N x N matrix. Equivalent to:

        logits = logit_scale * image_features @ text_features.T
        labels = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    (Radford et al., arXiv 2103.00020). The textbook form without temperature, the sum over pairs of
    both directions' cross-entropy, is `2 * clip_loss(x, y, 1.0, normalize=True, reduction="sum")`.

    Args:
        image_features: (N, D), float64, float32, bfloat16 or float16, any strides. Row i pairs with
            row i of the text features. They are not normalised here, since open_clip's models
            return normalised features; see `normalize`.
        text_features: (N, D). Mixed dtypes promote as in torch. Under autocast both are cast to the
            autocast dtype, as for a matmul, but logits and loss stay in float32.
        logit_scale: already exponentiated; a number or a tensor of one element, 0-dim or [1].
        logit_bias: accepted because SigLIP models return one. It cancels, so its gradient is
            exactly 0.
        ids: (image ids (N), text ids (N)), integers, or one tensor (N) for both. Pairs with equal
            ids, such as duplicate captions, are no negatives.
        same_id: "ignore" leaves these pairs out; "positive" makes them positives beside the own
            pair: the loss of a line is the mean over its positives of log-sum-exp minus their logit
            (UniCL, Yang et al., arXiv 2204.03610).
        label_smoothing: as in `F.cross_entropy`, over the pairs that are not left out.
        weights: (N), floating point: multiplies the pairs' losses; the mean divides by its sum.
        normalize: divide rows by max(norm, 1e-12) first, fused. Gradients are then those of the
            features before the division.
        reduction: "mean", "sum", or "none" for (N,) losses, half the row's plus half the column's
            cross-entropy.
        backend: None picks the fastest engine that can run; see `fastclip.backends()`.
        memory_budget: bytes in which products of the forward (with the Triton engine: weights, 2
            bytes a pair for half features) may be kept for the backward, which recomputes the rest.
            Default: 256 MiB on CPUs, 0 on GPUs. It changes results by rounding alone. On CPUs the
            buffers are reused by the next step; `fastclip.release_workspace()` frees them.
        live: (start, stop), the pairs whose features this step differentiates, for accumulation
            over micro-batches; the other pairs' features are constants of the batch. Gradients of
            live features equal those of the whole batch's loss. The value and the gradients of
            scale and bias are partial: summed over slices that cover the batch, they equal the
            whole batch's. CLIP's forward costs the same as without `live`. SigLIP's forward costs
            the share `(stop - start) / N` of that. A backward costs the same share for gradients
            of the image features alone, 4/3 of the share for both towers, 3/2 for the text features
            alone, since the logits of live rows and of live columns are streamed apart.
            `fastclip.cached_step` computes the loss only once instead.

    Returns:
        The loss in float32 (float64 for float64 features), on the features' device. The gradients
        have their input's dtype and shape. They are the exact gradients of the returned loss (with
        `live`, see there) and have no second derivative.

    Raises:
        TypeError: features that are not tensors, not floating point, or a DTensor; a scale or bias
            that is not a number.
        ValueError: shapes or devices that do not fit, an empty batch, an unknown reduction, a
            backend that is unknown or cannot run here, a memory_budget that is not an int >= 0,
            live pairs outside the batch, or `live` with reduction "none", backend "reference", ids,
            label_smoothing or weights.
        RuntimeError: forward-mode differentiation (torch.func.jvp, dual numbers); a second
            derivative.
    """
    options = InfoNCE(ids=ids, same_id=same_id, label_smoothing=label_smoothing, symmetric=True)
    if needs_lines(ids, label_smoothing, weights, same_id):
        check_no_live(live)
        world = one_process(normalize, backend, memory_budget)
        return clip(
            world, image_features, text_features, logit_scale, logit_bias, options,
            Reduction(reduction, weights),
        )  # fmt: skip
    return paired_loss(
        "softmax", dense_clip_loss, image_features, text_features, logit_scale, logit_bias,
        normalize, reduction, backend, memory_budget, live,
    )  # fmt: skip


def dense_clip_loss(
    image_features: Tensor,  # (N, D)
    text_features: Tensor,  # (N, D)
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    ids: tuple[Tensor, Tensor] | Tensor | None = None,
    same_id: str = "ignore",
    label_smoothing: float = 0,
    weights: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """`clip_loss` with its N x N matrix: each image picks its text from the batch, each text its
    image.

    Per pair, `loss_i = (CE(row i) + CE(column i)) / 2` with `CE(row i) = logsumexp_j(s_ij) - s_ii`
    and `CE(column i) = logsumexp_j(s_ji) - s_ii`.

    Args: as `clip_loss`; backend and memory_budget are ignored.

    Returns:
        The loss, 0-dim, or (N,) for "none"; float64 if either tower is float64, else float32.

    Raises:
        ValueError: an unknown reduction.
    """
    if ids is None:
        logits = dense_logits(image_features, text_features, logit_scale, None, normalize)
        labels = torch.arange(logits.shape[0], device=logits.device)
        options = {"reduction": "none", "label_smoothing": label_smoothing}
        rows = F.cross_entropy(logits, labels, **options)
        columns = F.cross_entropy(logits.T, labels, **options)
        losses = (rows + columns) / 2
    else:
        losses = dense_info_nce(
            image_features, text_features, logit_scale, ids=pair_of(ids), same_id=same_id,
            label_smoothing=label_smoothing, symmetric=True, normalize=normalize, reduction="none",
        )  # fmt: skip
    if logit_bias is not None:
        # If the bias were added to the logits, its gradient would be a rounding error instead of 0.
        losses = losses + 0 * as_scalar(logit_bias, losses)
    return reduce_lines(losses, reduction, weights)
